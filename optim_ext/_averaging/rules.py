"""What an average is: its rules, and functions of torch's kinds made from them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optim_ext._averaging.pairing import host_count, is_native, local_parts

Decay: TypeAlias = "float | Callable[[Any], Any]"


class AveragingRule(abc.ABC):
    """A native averaging rule: ``average += weight(n) * (param - average)`` after n models."""

    @abc.abstractmethod
    def weight(self, n: Any) -> Any:
        """Of the newest model in the average."""

    @abc.abstractmethod
    def average(self, average: Tensor, current: Tensor, n: Any) -> Tensor:
        """The rule in torch's own operations, for what no kernel of ours covers."""


@dataclass(frozen=True)
class Mean(AveragingRule):
    def weight(self, n: Any) -> Any:
        return (n + 1).double().reciprocal() if isinstance(n, Tensor) else 1.0 / (n + 1)

    def average(self, average: Tensor, current: Tensor, n: Any) -> Tensor:
        moved: Tensor = average + (current - average) / (n + 1)
        return moved


@dataclass(frozen=True)
class Ema(AveragingRule):
    decay: Decay

    def __post_init__(self) -> None:
        if not callable(self.decay):
            check_decay(self.decay)

    def decay_after(self, n: Any) -> Any:
        if not callable(self.decay):
            return self.decay
        decay = self.decay(n)
        if not isinstance(decay, Tensor) or decay.device.type == "cpu":
            check_decay(decay)
        return decay

    def weight(self, n: Any) -> Any:
        return 1 - self.decay_after(n)

    def average(self, average: Tensor, current: Tensor, n: Any) -> Tensor:
        decay = self.decay_after(n)
        moved: Tensor = decay * average + (1 - decay) * current
        return moved


def check_decay(decay: Any) -> None:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"Invalid decay value {decay} provided. Please provide a value in [0,1] range.")


@dataclass(frozen=True)
class AvgFn:
    """An ``avg_fn`` that ``AveragedModel`` runs natively; called by others, it computes what torch's does."""

    rule: AveragingRule

    @torch.no_grad()
    def __call__(self, averaged_param: Tensor, current_param: Tensor, num_averaged: Any) -> Tensor:
        return self.rule.average(averaged_param, current_param, num_averaged)


@dataclass(frozen=True)
class MultiAvgFn:
    """A ``multi_avg_fn`` that runs natively, also when it is called by others."""

    rule: AveragingRule

    @torch.no_grad()
    def __call__(self, averaged_params: Sequence[Tensor], current_params: Sequence[Tensor], num_averaged: Any) -> None:
        native: list[tuple[Tensor, Tensor]] = []
        others: list[tuple[Tensor, Tensor]] = []
        for average, current in zip(averaged_params, current_params, strict=True):
            pair = local_parts(average, current)
            (native if is_native(*pair) and pair[0].device == pair[1].device else others).append(pair)
        if native:
            weight = self.rule.weight(host_count(num_averaged))
            averages, params = zip(*native, strict=True)
            torch.ops.optim_ext.average_(averages, params, weight=torch.as_tensor(weight, dtype=torch.float64))
        for average, param in others:
            average.copy_(self.rule.average(average, param, num_averaged))


@dataclass(frozen=True)
class WarmupDecay:
    decay: float
    gamma: float
    power: float

    def __call__(self, n: Any) -> Any:
        ramp = 1 - (1 + n / self.gamma) ** -self.power
        return ramp.clamp(max=self.decay) if isinstance(ramp, Tensor) else min(self.decay, ramp)


@dataclass(frozen=True)
class PowerDecay:
    gamma: float

    def __call__(self, n: Any) -> Any:
        return (1 - 1 / (n + 1)) ** (self.gamma + 1)


def weight_of(rule: AveragingRule, n_averaged: Tensor) -> float | Tensor:
    """Of the newest model in the average, which it replaces the first time."""
    if n_averaged.device.type == "cpu":
        n = int(n_averaged)
        return 1.0 if n == 0 else float(rule.weight(n))
    weight = rule.weight(n_averaged.double())
    if not isinstance(weight, Tensor):
        weight = n_averaged.new_full((), weight, dtype=torch.float64)
    return torch.where(n_averaged == 0, torch.ones_like(weight), weight)
