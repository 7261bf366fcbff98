"""What every optimizer with a native step has in common, whatever its rule."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class NativeStep(Optimizer):
    """Base of all optimizers whose step runs natively: of :class:`optim_ext._fused_step.FusedStep` and of L-BFGS."""

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
