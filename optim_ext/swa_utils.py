"""Averaged models, as in ``torch.optim.swa_utils``: the mean of the weights (SWA) and exponential moving averages (EMA).

``AveragedModel`` is a subclass of torch's that runs the two natively, in one call over all parameters and without
reading a GPU. It adds averages of another dtype than the model's, ``copy_to`` and ``swap_into``, decays that depend on
the number of updates, ``update_every``, and averaging within an optimizer's step (``optimizer.average_into``).
``SWALR`` and ``update_bn`` are torch's own.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Module
from torch.optim import swa_utils
from torch.optim.swa_utils import SWALR as SWALR
from torch.optim.swa_utils import update_bn as update_bn

from optim_ext._grad_control import is_sharded
from optim_ext._load import _C

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

Count: TypeAlias = "int | Tensor"  # how many models have been averaged: a 0-dim double where it lives on a GPU
Decay: TypeAlias = "float | Callable[[Any], Any]"


class _Rule:
    """A native averaging rule: ``average += weight(n) * (param - average)`` after n models."""

    def weight(self, n: Any) -> Any:
        raise NotImplementedError

    def average(self, average: Tensor, current: Tensor, n: Any) -> Tensor:
        """The rule in torch's own operations, for what no kernel of ours covers."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Mean(_Rule):
    def weight(self, n: Any) -> Any:
        return (n + 1).double().reciprocal() if isinstance(n, Tensor) else 1.0 / (n + 1)

    def average(self, average: Tensor, current: Tensor, n: Any) -> Tensor:
        moved: Tensor = average + (current - average) / (n + 1)
        return moved


@dataclass(frozen=True)
class _Ema(_Rule):
    decay: Decay

    def __post_init__(self) -> None:
        if not callable(self.decay):
            _check_decay(self.decay)

    def decay_after(self, n: Any) -> Any:
        if not callable(self.decay):
            return self.decay
        decay = self.decay(n)
        if not isinstance(decay, Tensor) or decay.device.type == "cpu":
            _check_decay(decay)
        return decay

    def weight(self, n: Any) -> Any:
        return 1 - self.decay_after(n)

    def average(self, average: Tensor, current: Tensor, n: Any) -> Tensor:
        decay = self.decay_after(n)
        moved: Tensor = decay * average + (1 - decay) * current
        return moved


def _check_decay(decay: Any) -> None:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"Invalid decay value {decay} provided. Please provide a value in [0,1] range.")


@dataclass(frozen=True)
class _AvgFn:
    """An ``avg_fn`` that ``AveragedModel`` runs natively; called by others, it computes what torch's does."""

    rule: _Rule

    @torch.no_grad()
    def __call__(self, averaged_param: Tensor, current_param: Tensor, num_averaged: Any) -> Tensor:
        return self.rule.average(averaged_param, current_param, num_averaged)


@dataclass(frozen=True)
class _MultiAvgFn:
    """A ``multi_avg_fn`` that runs natively, also when it is called by others."""

    rule: _Rule

    @torch.no_grad()
    def __call__(self, averaged_params: Sequence[Tensor], current_params: Sequence[Tensor], num_averaged: Any) -> None:
        native: list[tuple[Tensor, Tensor]] = []
        others: list[tuple[Tensor, Tensor]] = []
        for average, current in zip(averaged_params, current_params, strict=True):
            pair = _parts(average, current)
            (native if _is_native(*pair) and pair[0].device == pair[1].device else others).append(pair)
        if native:
            weight = self.rule.weight(_host_count(num_averaged))
            averages, params = zip(*native, strict=True)
            torch.ops.optim_ext.average_(averages, params, weight=torch.as_tensor(weight, dtype=torch.float64))
        for average, param in others:
            average.copy_(self.rule.average(average, param, num_averaged))


def get_swa_avg_fn() -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The mean of all models averaged so far (SWA), for ``AveragedModel(avg_fn=...)``.

    Source: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization (2018).
    """
    return _AvgFn(_Mean())


def get_swa_multi_avg_fn() -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """The mean of all models averaged so far (SWA), for ``AveragedModel(multi_avg_fn=...)``."""
    return _MultiAvgFn(_Mean())


def get_ema_avg_fn(decay: Decay = 0.999) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The exponential moving average, for ``AveragedModel(avg_fn=...)``; see :func:`get_ema_multi_avg_fn`."""
    return _AvgFn(_Ema(decay))


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
    return _MultiAvgFn(_Ema(decay))


@dataclass(frozen=True)
class _WarmupDecay:
    decay: float
    gamma: float
    power: float

    def __call__(self, n: Any) -> Any:
        ramp = 1 - (1 + n / self.gamma) ** -self.power
        return ramp.clamp(max=self.decay) if isinstance(ramp, Tensor) else min(self.decay, ramp)


@dataclass(frozen=True)
class _PowerDecay:
    gamma: float

    def __call__(self, n: Any) -> Any:
        return (1 - 1 / (n + 1)) ** (self.gamma + 1)


def get_warmup_decay(decay: float = 0.9999, gamma: float = 1.0, power: float = 2 / 3) -> Callable[[Any], Any]:
    """A decay that grows with the number n of averaged models: ``min(decay, 1 - (1 + n / gamma) ** -power)``.

    A young average then forgets the first, untrained weights quickly. Timm's and the diffusion trainers' warm-up;
    power 2/3 suits runs of a million updates or more, 3/4 shorter ones.

    Raises:
        ValueError: decay outside [0, 1], or gamma or power not positive.
    """
    _check_decay(decay)
    if not (gamma > 0 and power > 0):
        raise ValueError(f"gamma and power must be positive, got {gamma} and {power}")
    return _WarmupDecay(decay, gamma, power)


def get_power_decay(gamma: float) -> Callable[[Any], Any]:
    """The decay ``(1 - 1 / t) ** (gamma + 1)`` at update t: an average whose width stays a fixed share of the training.

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (2024); gamma 16.97 and 6.94
    give their widths of 5 % and 10 %.

    Raises:
        ValueError: gamma is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    return _PowerDecay(gamma)


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

    Raises:
        ValueError: ``dtype`` is not floating point or ``update_every`` not a positive whole number.
        AssertionError: both ``avg_fn`` and ``multi_avg_fn`` are given.
    """

    _calls = 0  # of update_parameters

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
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating point type, got {dtype}")
        if not isinstance(update_every, int) or update_every < 1:
            raise ValueError(f"update_every must be a positive whole number, got {update_every}")
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        if dtype is not None:
            self.module._apply(lambda tensor: _as_dtype(tensor, dtype))  # type: ignore[no-untyped-call]
        self.update_every = update_every
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
                weight = _weight(rule, self.n_averaged)
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
        matched = [*_matched(self.module, model, "parameters"), *_matched(self.module, model, "buffers")]
        _copy([current for _, _, current in matched], [average for _, average, _ in matched])

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
                _copy(own, saved)

    def _is_due(self) -> bool:
        return self._calls % self.update_every == 0

    def _rule(self) -> _Rule | None:
        """The native rule, or None where the user's own function is to be called."""
        function = self.multi_avg_fn or self.avg_fn
        if function is None:
            return _Mean()
        return function.rule if isinstance(function, (_AvgFn, _MultiAvgFn)) else None

    def _pairing(self, model: Module) -> _Pairing:
        pairing: _Pairing | None = self.__dict__.get("_paired")
        if pairing is None or pairing.use_buffers != self.use_buffers or not pairing.is_current(self.module, model):
            self.__dict__["_paired"] = None  # its hold on another model's tensors ends here
            pairing = _Pairing(self.module, model, self.use_buffers)
            self._remember(model)
            self.__dict__["_paired"] = pairing
        return pairing

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
        matched = list(_matched(self.module, model, "parameters"))
        if self.use_buffers:
            matched += _matched(self.module, model, "buffers")
        copied = [] if self.use_buffers else list(_matched(self.module, model, "buffers"))
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
        _copy([average for _, average, _ in copied], [current for _, _, current in copied])
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


class _Pairing:
    """The tensors of an average and of the model it follows, matched once and verified at every update."""

    def __init__(self, module: Module, model: Module, use_buffers: bool):
        self.use_buffers = use_buffers
        matched = list(_matched(module, model, "parameters"))
        copied = list(_matched(module, model, "buffers"))
        if use_buffers:
            matched, copied = matched + copied, []
        native = list(_native(matched))
        # DTensors whose parts, which the plan knows, may be replaced: those are told by their addresses.
        self.sharded: list[Any] = [whole for _, *pair in matched for whole in pair if is_sharded(whole)]
        self.parts = [id(whole._local_tensor) for whole in self.sharded]
        others = [(average, current) for _, average, current in matched if not _is_native(*_parts(average, current))]
        self.shards = [pair for pair in others if all(is_sharded(t) and t.is_floating_point() for t in pair)]
        self.others = [pair for pair in others if all(pair is not shard for shard in self.shards)]
        self.copied = [average for _, average, _ in copied], [current for _, _, current in copied]
        trees = [list(module.modules()), list(model.modules())]
        walked_as_usual = all(_has_usual_walk(*tree) for tree in trees)
        self.plan = _plan(native, trees if walked_as_usual else [])

    def is_current(self, module: Module, model: Module) -> bool:
        # The plan's own tensors are looked at by its op, before it writes; these come last.
        pairs = itertools.chain(self.shards, self.others, zip(*self.copied, strict=True))
        return (
            [id(whole._local_tensor) for whole in self.sharded] == self.parts
            and self.plan.is_current(module, model)
            and all(average.shape == now.shape for average, now in pairs)
        )

    def finish(self, rule: _Rule, n_averaged: Tensor, weight: float | Tensor, found_inf: Tensor | None = None) -> None:
        """What is left once the plan has run: the tensors no kernel covers, and the buffers that are copied."""
        others = self.others
        if isinstance(weight, float) and (found_inf is None or found_inf.device.type == "cpu"):
            self._average_shards(weight)
        else:
            others = [*self.shards, *others]
        if others:
            first = n_averaged == 0
            for average, current in others:
                here = current.to(average.device)
                n = n_averaged.to(average.device)
                if n.device.type == "cpu":
                    new = here if first else rule.average(average, here, _host_count(n))
                else:
                    new = torch.where(first.to(average.device), here, rule.average(average, here, n).to(average.dtype))
                _copy([average], [new], found_inf)
        _copy(*self.copied, found_inf)

    def _average_shards(self, weight: float) -> None:
        """DTensors that are laid out differently, in as few operations as torch's own average takes: each of them moves
        parts between processes."""
        if weight == 1.0:
            for average, current in self.shards:
                average.copy_(current)
        elif self.shards:
            averages, currents = zip(*self.shards, strict=True)
            torch._foreach_lerp_(averages, currents, weight)


class StepAveraging:
    """An averaged model as the step of one optimizer keeps it up to date."""

    def __init__(self, averaged: AveragedModel, model: Module):
        self.averaged, self.model = averaged, model
        self.pairing()

    def pairing(self) -> _Pairing:
        return self.averaged._pairing(self.model)

    def native(self) -> list[tuple[str, Tensor, Tensor]]:
        """What a kernel averages. Looked up where it is needed: nothing here keeps replaced tensors alive."""
        kinds = ("parameters", "buffers") if self.averaged.use_buffers else ("parameters",)
        matched = itertools.chain.from_iterable(_matched(self.averaged.module, self.model, kind) for kind in kinds)
        return list(_native(matched))

    def weight(self, found_inf: Tensor | None) -> float | Tensor | None:
        """What average_ is to be given at this step; None where it is not this step's turn."""
        if not self.averaged._is_due():
            return None
        n_averaged = self.averaged.n_averaged
        if found_inf is not None and found_inf.device.type != "cpu" and n_averaged.device != found_inf.device:
            # Whether this step counts is known there only.
            self.averaged.n_averaged = n_averaged.to(found_inf.device)
        return _weight(self._rule(), self.averaged.n_averaged)

    def in_step(self, params: Iterable[Tensor], stand_ins: Mapping[int, Tensor]) -> dict[Tensor, Tensor]:
        """The averages of an optimizer's parameters, but of those it updates twice in a step, or only some rows of.
        ``stand_ins``: by which tensors a step knows local tensors of DTensors, by identity."""
        times: dict[Tensor, int] = {}
        for p in params:
            times[p] = times.get(p, 0) + (2 if p.grad is not None and p.grad.is_sparse else 1)
        known = ((stand_ins.get(id(current), current), average) for _, average, current in self.native())
        return {current: average for current, average in known if times.get(current) == 1}

    def besides(self, in_step: dict[Tensor, Tensor], stand_ins: Mapping[int, Tensor]) -> _C.AveragePlan:
        return _plan([entry for entry in self.native() if stand_ins.get(id(entry[2]), entry[2]) not in in_step])

    @torch.no_grad()
    def finish(
        self, pairing: _Pairing, weight: float | Tensor | None, besides: _C.AveragePlan, found_inf: Tensor | None
    ) -> None:
        """What the step itself has not averaged, and the counters. ``pairing`` is this step's."""
        skipped = found_inf is not None and found_inf.device.type == "cpu" and float(found_inf) == 1.0
        if weight is not None and not skipped:
            n_averaged = self.averaged.n_averaged
            besides.run(weight, found_inf)
            pairing.finish(self._rule(), n_averaged, weight, found_inf)
            n_averaged.add_(1 if found_inf is None or found_inf.device.type == "cpu" else found_inf.reshape(()) != 1)
        self.averaged._calls += 1

    @_disable_dynamo  # torch.compiler.disable imports the whole compiler where it decorates
    def update(self, found_inf: Tensor | None = None) -> None:
        """After a step that could not average: the update on its own."""
        pairing = self.pairing()
        self.finish(pairing, self.weight(found_inf), pairing.plan, found_inf)

    def _rule(self) -> _Rule:
        rule = self.averaged._rule()
        if rule is None:
            raise ValueError("an average with an avg_fn or multi_avg_fn of its own cannot be part of a step")
        return rule


def step_averaging(averaged: Any, model: Module | None, optimizer: Any) -> StepAveraging:
    """``averaged`` bound to ``optimizer``, or an error that says why it cannot be."""
    if isinstance(averaged, swa_utils.AveragedModel) and not isinstance(averaged, AveragedModel):
        raise TypeError(
            "this is torch.optim.swa_utils.AveragedModel; use optim_ext.swa_utils.AveragedModel, which loads its state_dict"
        )
    if not isinstance(averaged, AveragedModel):
        raise TypeError(f"expected an optim_ext.swa_utils.AveragedModel, got {type(averaged).__name__}")
    if averaged._rule() is None:
        raise ValueError(
            "this average has an avg_fn or multi_avg_fn of its own; call its update_parameters() after the step, or use "
            "one of optim_ext.swa_utils' functions"
        )
    attached = averaged.__dict__.get("_optimizer", lambda: None)()
    if attached is not None and attached._asked() is not optimizer._asked() and attached._asked().averaging is not None:
        raise ValueError("another optimizer updates this average in its step; detach it with average_into(None)")
    if model is None:
        model = averaged.__dict__.get("_source", lambda: None)()
        if model is None:
            raise ValueError("the model behind this average is not known any more; pass it as model=")
    averaging = StepAveraging(averaged, model)
    params = {p for group in optimizer.param_groups for p in group["params"]}
    for name, average, current in averaging.native():
        if current in params and average.device != current.device:
            raise ValueError(
                f"parameter '{name}' is on {current.device} and its average on {average.device}: a step can average on "
                "one device only; call update_parameters() after the step"
            )
    if params.isdisjoint(model.parameters()):
        raise ValueError("none of the optimizer's parameters belongs to the averaged model")
    averaged.__dict__["_optimizer"] = weakref.ref(optimizer)
    return averaging


def _weight(rule: _Rule, n_averaged: Tensor) -> float | Tensor:
    """Of the newest model in the average, which it replaces the first time."""
    if n_averaged.device.type == "cpu":
        n = int(n_averaged)
        return 1.0 if n == 0 else float(rule.weight(n))
    weight = rule.weight(n_averaged.double())
    if not isinstance(weight, Tensor):
        weight = n_averaged.new_full((), weight, dtype=torch.float64)
    return torch.where(n_averaged == 0, torch.ones_like(weight), weight)


def _host_count(n: Any) -> Any:
    return int(n) if isinstance(n, Tensor) and n.device.type == "cpu" else n


def _plan(matched: Sequence[tuple[str, Tensor, Tensor]], trees: Sequence[list[Module]] = ()) -> _C.AveragePlan:
    names, averages, currents = (list(column) for column in zip(*matched, strict=True)) if matched else ([], [], [])
    return _C.AveragePlan(list(trees), names, averages, currents)


def _matched(module: Module, model: Module, kind: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, average, current) for all parameters or buffers, in torch's order; every mismatch is an error."""
    averages, currents = (list(getattr(m, f"named_{kind}")()) for m in (module, model))
    if len(averages) != len(currents):
        longer, owner = (averages, "average") if len(averages) > len(currents) else (currents, "model")
        raise ValueError(
            f"the average has {len(averages)} {kind} and the model {len(currents)}; '{longer[-1][0]}' of the {owner} "
            "has no counterpart"
        )
    what = kind.removesuffix("s")
    for (_, average), (name, current) in zip(averages, currents, strict=True):
        if average.shape != current.shape:
            raise ValueError(
                f"{what} '{name}' of the model has shape {tuple(current.shape)}, its average {tuple(average.shape)}"
            )
        if _kind(average) != _kind(current):
            raise ValueError(f"{what} '{name}' of the model is of {current.dtype}, its average of {average.dtype}")
        if current.is_meta != average.is_meta:
            raise ValueError(f"{what} '{name}': the model's is on {current.device}, its average on {average.device}")
        yield name, average, current


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "floating point" if tensor.is_floating_point() else "integer"


def _part(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, the object that the DTensor holds: to_local() may give a passing view of it."""
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return part


def _parts(average: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """What a pair means to this process: of two DTensors that are laid out alike, its parts, which no other process needs
    to know; else the pair itself."""
    if not (is_sharded(average) and is_sharded(current)):
        return average, current
    layouts = [(tensor.device_mesh, tensor.placements) for tensor in (average, current)]  # type: ignore[attr-defined]
    mine, others = _part(average), _part(current)
    alike = layouts[0] == layouts[1] and mine.shape == others.shape
    return (mine, others) if alike and not any(place.is_partial() for place in layouts[0][1]) else (average, current)


def _native(matched: Iterable[tuple[str, Tensor, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of (name, average, current) those that average_ covers, in the tensors it is given."""
    for name, *pair in matched:
        average, current = _parts(*pair)
        if _is_native(average, current):
            yield name, average, current


def _is_native(average: Tensor, current: Tensor) -> bool:
    """Whether average_ covers a pair; a parameter on another device is copied to the average's first."""
    return (
        (average.is_floating_point() or average.is_complex())
        and _C.unsupported(average) is None
        and _C.unsupported_grad(current) is None
        and not (current.is_conj() or current.is_neg())
    )


def _has_usual_walk(root: Module, *below: Module) -> bool:
    """Whether parameters() and buffers() visit what the modules' own dictionaries hold."""
    of_root = ("parameters", "named_parameters", "buffers", "named_buffers", "_named_members", "modules")
    return all(_is_own(root, name) for name in of_root) and all(_is_own(m, "named_modules") for m in (root, *below))


def _is_own(module: Module, name: str) -> bool:
    return getattr(getattr(module, name), "__func__", None) is getattr(Module, name)


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _copy(to: list[Tensor], values: list[Tensor], found_inf: Tensor | None = None) -> None:
    """Copies in place, unless ``found_inf`` is one."""
    if not to:
        return
    parts = [_parts(tensor, value) for tensor, value in zip(to, values, strict=True)]
    to, values = [tensor for tensor, _ in parts], [value for _, value in parts]
    if found_inf is not None and found_inf.device.type != "cpu":
        keep = [found_inf.reshape(()).to(tensor.device) == 1 for tensor in to]
        values = [
            torch.where(k, tensor, value.to(tensor.device, tensor.dtype))
            for k, tensor, value in zip(keep, to, values, strict=True)
        ]
    if all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (*to, *values)):
        torch._foreach_copy_(to, values)
    else:  # subclasses (DTensors that are laid out differently) know single operations only
        for tensor, value in zip(to, values, strict=True):
            tensor.copy_(value)
