"""Types of the compiled module."""

from typing import Any

from torch import Tensor

class Plan:
    """What one optimizer hands to its op, gathered once; verified against the optimizer at every step."""

    signature: Any
    def __init__(
        self,
        op: str,
        param_groups: list[dict[str, Any]],
        state: dict[Any, Any],
        calls: list[tuple[int, list[int], tuple[str | None, ...]]],
    ) -> None: ...
    def step(
        self,
        state: dict[Any, Any],
        param_groups: list[dict[str, Any]],
        hypers: list[tuple[Any, ...]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        grad_factor: Tensor | None,
        check_only: bool = False,
    ) -> bool: ...

def unsupported(tensor: Tensor) -> str | None: ...
def unsupported_grad(grad: Tensor) -> str | None: ...
def isa() -> str: ...
def ops() -> list[str]: ...

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
    def append_dots(self, dots: Tensor) -> None: ...
    def push(self, dots: Tensor, history_size: int, least_curvature: float) -> bool: ...
    def coefficients(self) -> Tensor: ...
