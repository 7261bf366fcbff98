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

def grad_norm(
    param_groups: list[dict[str, Any]],
    norm_type: float = 2.0,
    max_norm: float | None = None,
    skip_nonfinite: bool = False,
    skip_above: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    skips: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def unsupported(tensor: Tensor) -> str | None: ...
def unsupported_grad(grad: Tensor) -> str | None: ...
def isa() -> str: ...
def ops() -> list[str]: ...
