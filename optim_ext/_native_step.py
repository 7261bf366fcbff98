"""What every optimizer with a native step has in common, whatever its rule."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.optim import Optimizer

from optim_ext import _grad_control
from optim_ext._grad_control import GroupNorms, NonFinite


class NativeStep(Optimizer):
    """Base of all optimizers whose step runs natively: of :class:`optim_ext._fused_step.FusedStep` and of L-BFGS."""

    def find_nonfinite(self) -> list[NonFinite]:
        """Name the parameters whose gradient or value is not finite, with counts (of parts, for complex numbers; of this
        process's part, for sharded parameters).

        An empty list if there are none. Reads everything, and waits for the device.
        """
        return _grad_control.find_nonfinite(self)

    def measure_step(self) -> AbstractContextManager[list[GroupNorms]]:
        """Norms of gradient, parameter and update of each group for a step taken inside, there when it ends::

            with optimizer.measure_step() as norms:
                optimizer.step()
            print(norms[0].update / norms[0].param)

        Keeps a copy of all parameters meanwhile.
        """
        return _grad_control.measure_step(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` of this class, or of torch's class of the same name, returned.

        As in torch, state takes the dtype and device of its parameter, with one difference: numbers in tensors, such as
        step counts and running products, keep the precision they were saved in. A loaded run has the bits of one that
        was never interrupted.

        Args:
            state_dict: the options and state; it is not written to.

        Raises:
            ValueError: the parameter groups are not those of this optimizer.
        """
        given: list[dict[str, Any]] = []
        handles = (
            self.register_load_state_dict_pre_hook(lambda _, seen: given.append(seen)),  # after hooks that replace it
            self.register_load_state_dict_post_hook(lambda _: self._undo_casts(given[-1]), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _undo_casts(self, saved: dict[str, Any]) -> None:
        """Put back what torch, which knows of parameters and step counts only, has cast to the dtype of a parameter."""
        raise NotImplementedError
