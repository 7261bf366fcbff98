"""The words of a rule (:func:`optim_ext.rule`) that Python lacks: each works on numbers and on tensors, but for norms."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["clamp", "exp", "lerp", "log", "maximum", "minimum", "norm", "rms", "sign", "sqrt", "square", "where"]

Value = TypeVar("Value", float, Tensor)
Any = float | Tensor


def sqrt(x: Value) -> Value:
    """The square root."""
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def exp(x: Value) -> Value:
    """e to the power of ``x``."""
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def log(x: Value) -> Value:
    """The natural logarithm."""
    return torch.log(x) if isinstance(x, Tensor) else math.log(x)


def sign(x: Value) -> Value:
    """1, 0 or -1; 0 for NaN."""
    return torch.sign(x) if isinstance(x, Tensor) else float((x > 0) - (x < 0))


def square(x: Value) -> Value:
    """``x * x``."""
    return x * x


def where(condition: bool | Tensor, a: Any, b: Any) -> Any:
    """``a`` where the condition holds, else ``b``."""
    if not isinstance(condition, Tensor):
        return a if condition else b
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        a = torch.tensor(a, dtype=torch.float64, device=condition.device)
    return torch.where(condition, a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller one; NaN if either is NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(*_both(a, b))
    return a if math.isnan(a) else min(b, a)


def maximum(a: Any, b: Any) -> Any:
    """The larger one; NaN if either is NaN."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(*_both(a, b))
    return a if math.isnan(a) else max(b, a)


def clamp(x: Any, least: Any, most: Any) -> Any:
    """``x``, but not below ``least`` and not above ``most``."""
    return minimum(maximum(x, least), most)


def lerp(start: Any, end: Any, weight: Any) -> Any:
    """``start + weight * (end - start)``, from the nearer end."""
    if isinstance(start, Tensor) or isinstance(end, Tensor):
        start, end = _both(start, end)
        # Which wants one dtype of all, unlike arithmetic.
        dtype = start.dtype if start.dim() >= end.dim() else end.dtype
        weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
        return torch.lerp(start.to(dtype), end.to(dtype), weight)
    if isinstance(weight, Tensor):
        return where(weight < 0.5, start + weight * (end - start), end + (weight - 1) * (end - start))
    return start + weight * (end - start) if weight < 0.5 else end + (weight - 1) * (end - start)


def norm(x: Tensor) -> Tensor:
    """The Euclidean norm of a whole tensor, computed in double.

    Returns:
        A float64 tensor without dimensions, which computes with others as a number does.
    """
    found: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return found


def rms(x: Tensor) -> Tensor:
    """The root mean square of a whole tensor, computed in double; NaN where it has no element.

    Returns:
        A float64 tensor without dimensions, which computes with others as a number does.
    """
    return norm(x) / math.sqrt(x.numel())


def _both(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Two values, at least one of them a tensor, as tensors."""
    if isinstance(a, Tensor):
        return a, b if isinstance(b, Tensor) else torch.full((), b, dtype=a.dtype, device=a.device)
    assert isinstance(b, Tensor)
    return torch.full((), a, dtype=b.dtype, device=b.device), b
