"""Types of the compiled module."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

class Plan:
    """What one optimizer hands to its op, gathered once; verified against the optimizer at every step."""

    signature: Any
    besides: AveragePlan
    of_shards: bool
    may_skip: bool
    def __init__(
        self,
        op: str,
        param_groups: list[dict[str, Any]],
        state: dict[Any, Any],
        calls: list[tuple[int, list[int], tuple[str | None, ...], bool, bool]],
        averages: dict[Tensor, Tensor] = ...,
        partial: set[str] = ...,
        numbers: set[str] = ...,
    ) -> None: ...
    def step(
        self,
        state: dict[Any, Any],
        param_groups: list[dict[str, Any]],
        hypers: list[tuple[Any, ...]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        grad_factor: Tensor | None,
        average_weight: float | Tensor | None = None,
        check_only: bool = False,
    ) -> bool: ...

class AveragePlan:
    """What an averaged model hands to average_, gathered once; is_current() compares two module trees with it."""

    def __init__(
        self,
        trees: list[list[torch.nn.Module]],
        names: list[str],
        averages: list[Tensor],
        params: list[Tensor],
    ) -> None: ...
    def is_current(self, *roots: torch.nn.Module) -> bool: ...
    def run(self, weight: float | Tensor, found_inf: Tensor | None = None, check_only: bool = False) -> None: ...

def describe(param_groups: Sequence[Mapping[str, Any]], group: int, index: int) -> str: ...

class GradMarks:
    """The gradients of param_groups as they are now, held weakly."""

    def __init__(self, param_groups: Iterable[Mapping[str, Any]]) -> None: ...
    def writes_since(self, param_groups: Iterable[Mapping[str, Any]]) -> int | None:
        """How often all gradients have been written in place since; -1 if not all alike, None if they are others."""

def grad_norm(
    param_groups: Iterable[Mapping[str, Any]],
    norm_type: float = 2.0,
    max_norm: float | None = None,
    skip_nonfinite: bool = False,
    skip_above: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skips: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def unsupported(tensor: Tensor) -> str | None: ...
def unsupported_grad(grad: Tensor, takes_sparse: bool = False) -> str | None: ...
def vectors_of_one_block(count: int, numel: int, dtype: torch.dtype) -> list[Tensor]: ...
def lbfgs_read(flat: Tensor, params: list[Tensor], offsets: list[int]) -> None: ...
def lbfgs_read_grads(flat: Tensor, params: list[Tensor], offsets: list[int], negate: bool) -> bool: ...
def lbfgs_move(params: list[Tensor], d: Tensor, t: float, origin: Tensor | None) -> None: ...
def isa() -> str: ...
def rules() -> list[str]: ...
def step_ops() -> dict[str, dict[str, Any]]:
    """The ops an optimizer steps with, by name: ``lists`` of tensors as (argument, key of state, role), ``hypers`` as
    (argument, kind, option, index in the tuple there or None), and ``takes_sparse``."""

class LbfgsGram:
    """Dot products of an L-BFGS history's rows among themselves, oldest first."""

    @property
    def count(self) -> int: ...
    @property
    def h_diag(self) -> float: ...
    @property
    def curvatures(self) -> list[float]: ...
    @property
    def alpha(self) -> list[float]: ...
    def append_dots(self, dots: Tensor) -> None:
        """Adds the newest pair of a history from elsewhere, by the lbfgs_dots of its y with all rows."""

    def push(self, dots: Tensor, history_size: int, least_curvature: float) -> bool:
        """Takes what lbfgs_pair_ returned; whether the pair joined the history, which its curvature decides."""

    def coefficients(self) -> Tensor:
        """Those of lbfgs_combine_, after a push."""
