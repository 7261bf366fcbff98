"""Averaged models, as in ``torch.optim.swa_utils``: the mean of the weights (SWA) and exponential moving averages (EMA).

``AveragedModel`` is a subclass of torch's that runs the two natively, in one call over all parameters and without
reading a GPU. It adds averages of another dtype than the model's, ``copy_to`` and ``swap_into``, decays that depend on
the number of updates, ``update_every``, and averaging within an optimizer's step (``optimizer.average_into``).
``SWALR`` and ``update_bn`` are torch's own.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import swa_utils
from torch.optim.swa_utils import SWALR as SWALR
from torch.optim.swa_utils import update_bn as update_bn

from optim_ext._averaging.pairing import Match, Pairing, copy_tensors, match_tensors
from optim_ext._averaging.rules import (
    AveragingRule,
    AvgFn,
    Decay,
    Ema,
    Mean,
    MultiAvgFn,
    PowerDecay,
    WarmupDecay,
    check_decay,
    weight_of,
)

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_power_decay",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "get_warmup_decay",
    "update_bn",
]


def get_swa_avg_fn() -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The mean of all models averaged so far (SWA), for ``AveragedModel(avg_fn=...)``.

    Source: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization (2018).
    """
    return AvgFn(Mean())


def get_swa_multi_avg_fn() -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """The mean of all models averaged so far (SWA), for ``AveragedModel(multi_avg_fn=...)``."""
    return MultiAvgFn(Mean())


def get_ema_avg_fn(decay: Decay = 0.999) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The exponential moving average, for ``AveragedModel(avg_fn=...)``; see :func:`get_ema_multi_avg_fn`."""
    return AvgFn(Ema(decay))


def get_ema_multi_avg_fn(decay: Decay = 0.999) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """The exponential moving average ``decay * average + (1 - decay) * param``, for ``AveragedModel(multi_avg_fn=...)``.

    Args:
        decay: a number in [0, 1], or a function of how many models have been averaged so far, which returns one. That
            count is at least 1 (the first update copies), an int where ``n_averaged`` is on the CPU and else a 0-dim
            double tensor, for which the function should use tensor operations so that nothing is read from the GPU;
            the range of what it returns is checked on the CPU only. See :func:`get_warmup_decay` and
            :func:`get_power_decay`.

    Raises:
        ValueError: the decay is outside [0, 1].
    """
    return MultiAvgFn(Ema(decay))


def get_warmup_decay(decay: float = 0.9999, gamma: float = 1.0, power: float = 2 / 3) -> Callable[[Any], Any]:
    """A decay that grows with the number n of averaged models: ``min(decay, 1 - (1 + n / gamma) ** -power)``.

    A young average then forgets the first, untrained weights quickly. Timm's and the diffusion trainers' warm-up;
    power 2/3 suits runs of a million updates or more, 3/4 shorter ones.

    Raises:
        ValueError: decay outside [0, 1], or gamma or power not positive.
    """
    check_decay(decay)
    if not (gamma > 0 and power > 0):
        raise ValueError(f"gamma and power must be positive, got {gamma} and {power}")
    return WarmupDecay(decay, gamma, power)


def get_power_decay(gamma: float) -> Callable[[Any], Any]:
    """The decay ``(1 - 1 / t) ** (gamma + 1)`` at update t: an average whose width stays a fixed share of the training.

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (2024); gamma 16.97 and 6.94
    give their widths of 5 % and 10 %.

    Raises:
        ValueError: gamma is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    return PowerDecay(gamma)


class AveragedModel(swa_utils.AveragedModel):
    """A running average of a model's parameters, as ``torch.optim.swa_utils.AveragedModel``.

    The default (the mean, SWA) and this module's EMA functions run as one native call over all parameters; any other
    ``avg_fn`` or ``multi_avg_fn`` is called as torch does. Checkpoints load from torch's class and into it.

    Args:
        model: the model to average; it is copied into ``module``.
        device: where the average lives; by default where the model does.
        avg_fn: ``avg_fn(average, param, n_averaged)`` returns the new average of one parameter.
        multi_avg_fn: ``multi_avg_fn(averages, params, n_averaged)`` updates lists in place.
        use_buffers: average the buffers too; otherwise they are copied from the model at each update. Integer buffers
            are averaged with the result truncated at each update.
        dtype: storage of the average where the model's parameters are floating point or complex (then the complex type
            of that precision), for instance ``torch.float32`` for a bfloat16 model. Default: as in the model.
        update_every: average at the first call of ``update_parameters`` and at every ``update_every``-th call after it.
        match: which of the model's tensors an average is of: ``"order"``, as torch has it, or ``"name"``, that of its name,
            so that a model may define its parameters in another order. What has no partner of its name is refused.

    Raises:
        ValueError: ``dtype`` is not floating point or ``update_every`` not a positive whole number, or
            ``match`` is neither of the two.
        AssertionError: both ``avg_fn`` and ``multi_avg_fn`` are given.
    """

    _calls = 0  # of update_parameters
    match: Match = "order"

    def __init__(
        self,
        model: Module,
        device: int | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Any], Tensor] | None = None,
        multi_avg_fn: Callable[[Any, Any, Any], None] | None = None,
        use_buffers: bool = False,
        *,
        dtype: torch.dtype | None = None,
        update_every: int = 1,
        match: Match = "order",
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating point type, got {dtype}")
        if not isinstance(update_every, int) or update_every < 1:
            raise ValueError(f"update_every must be a positive whole number, got {update_every}")
        if match not in ("order", "name"):
            raise ValueError(f"match must be 'order' or 'name', got {match!r}")
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        if dtype is not None:
            self.module._apply(lambda tensor: _as_dtype(tensor, dtype))  # type: ignore[no-untyped-call]
        self.update_every, self.match = update_every, match
        self._remember(model)

    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Bring the average up to date with ``model``; the first update copies.

        Raises:
            ValueError: the model's tensors do not match the average's in number, shape or kind. Nothing is written then.
        """
        if self._is_due():
            rule = self._rule()
            if rule is None:
                self._update_by_function(model)
            else:
                pairing = self._pairing(model)
                weight = weight_of(rule, self.n_averaged)
                pairing.plan.run(weight)
                pairing.finish(rule, self.n_averaged, weight)
                self.n_averaged.add_(1)
        self._calls += 1

    @torch.no_grad()
    def copy_to(self, model: Module) -> None:
        """Copy the averages, and the buffers that go with them, into ``model``, rounding to its dtypes.

        Raises:
            ValueError: the model's tensors do not match the average's in number, shape or kind. Nothing is written then.
        """
        matched = [*self._matched(model, "parameters"), *self._matched(model, "buffers")]
        copy_tensors([current for _, _, current in matched], [average for _, average, _ in matched])

    @contextmanager
    def swap_into(self, model: Module) -> Iterator[Module]:
        """Within the ``with`` block ``model`` has the averaged parameters and buffers; after it, its own again.

        Its own are kept aside meanwhile (memory of one model) and always put back, bit for bit, also after an exception.
        What the block itself changes in the model's parameters and buffers is lost.

        Raises:
            ValueError: as :meth:`copy_to`.
        """
        own = [tensor.detach() for tensor in itertools.chain(model.parameters(), model.buffers())]
        saved = [tensor.clone() for tensor in own]
        try:
            self.copy_to(model)
            yield model
        finally:
            with torch.no_grad():
                copy_tensors(own, saved)

    def _is_due(self) -> bool:
        return self._calls % self.update_every == 0

    def _rule(self) -> AveragingRule | None:
        """The native rule, or None where the user's own function is to be called."""
        function = self.multi_avg_fn or self.avg_fn
        if function is None:
            return Mean()
        return function.rule if isinstance(function, (AvgFn, MultiAvgFn)) else None

    def _pairing(self, model: Module) -> Pairing:
        pairing: Pairing | None = self.__dict__.get("_paired")
        if pairing is None or not self._is_current(pairing, model):
            self.__dict__["_paired"] = None  # its hold on another model's tensors ends here
            pairing = Pairing(self.module, model, self.use_buffers, self.match)
            self._remember(model)
            self.__dict__["_paired"] = pairing
        return pairing

    def _is_current(self, pairing: Pairing, model: Module) -> bool:
        asked = pairing.use_buffers == self.use_buffers and pairing.match == self.match
        return asked and pairing.is_current(self.module, model)

    def _matched(self, model: Module, kind: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, average, current) for all parameters or buffers; every mismatch is an error."""
        return match_tensors(self.module, model, kind, self.match)

    def _remember(self, model: Module) -> None:
        """Know the model averaged last, for ``average_into``, without keeping it or its tensors alive."""
        own = weakref.ref(self)

        def forget(_: Any) -> None:
            averaged = own()
            if averaged is not None:
                averaged.__dict__["_paired"] = None

        self.__dict__["_source"] = weakref.ref(model, forget)

    def _update_by_function(self, model: Module) -> None:
        """torch's own update, with the parameters in the average's dtype and every mismatch found first."""
        matched = list(self._matched(model, "parameters"))
        if self.use_buffers:
            matched += self._matched(model, "buffers")
        copied = [] if self.use_buffers else list(self._matched(model, "buffers"))
        pairs = [(avg.detach(), current.detach().to(avg.device, avg.dtype)) for _, avg, current in matched]
        if self.n_averaged == 0:
            for average, current in pairs:
                average.copy_(current)
        elif self.multi_avg_fn is not None:
            groups: dict[Any, list[tuple[Tensor, Tensor]]] = {}
            for average, current in pairs:
                groups.setdefault((average.device, average.dtype), []).append((average, current))
            for (device, _), group in groups.items():
                averages, currents = (list(tensors) for tensors in zip(*group, strict=True))
                self.multi_avg_fn(averages, currents, self.n_averaged.to(device))
        elif self.avg_fn is not None:
            for average, current in pairs:
                average.copy_(self.avg_fn(average, current, self.n_averaged.to(average.device)))
        copy_tensors([average for _, average, _ in copied], [current for _, _, current in copied])
        self.n_averaged.add_(1)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_paired", "_source", "_optimizer")}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Not an entry: torch's class, which knows no such thing, must be able to load the rest.
        if hasattr(destination, "_metadata") and self.update_every != 1:
            destination._metadata.setdefault(prefix[:-1], {})["calls"] = self._calls

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._calls = local_metadata.get("calls", 0)


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
