"""Fake kernels: what tracing (torch.compile, FakeTensorMode) needs to know of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optim_ext._load import _C


def _updates_in_place(*args: Any, **kwargs: Any) -> None:
    """Every op here writes into its arguments, as its schema says, and returns nothing."""


for _op in (*_C.step_ops(), "rule_", "average_", "clip_", "lbfgs_gather_", "lbfgs_displace_"):
    torch.library.register_fake(f"optim_ext::{_op}", _updates_in_place)


def _grad_norm(grads: list[Tensor], **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    in_double = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    dtypes = (torch.float64 if in_double else torch.float32, torch.float64, torch.float32)
    norm, grad_factor, found_inf = (grads[0].new_empty((), dtype=dtype) for dtype in dtypes)
    return norm, grad_factor, found_inf


def _one_per_tensor(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda tensors, **_: tensors[0].new_empty(len(tensors), dtype=dtype)


torch.library.register_fake("optim_ext::grad_norm", _grad_norm)
torch.library.register_fake("optim_ext::norms", _one_per_tensor(torch.float64))
torch.library.register_fake("optim_ext::count_nonfinite", _one_per_tensor(torch.int64))


# The ops of L-BFGS return sums in double, where their vectors are.


def _sums(like: Tensor, count: int) -> Tensor:
    return like.new_empty((count,), dtype=torch.float64)


def _norms(vector: Tensor, other: Tensor | None = None, **kwargs: Any) -> Tensor:
    return _sums(vector, 3)


def _dots(vector: Tensor, old_dirs: list[Tensor], old_stps: list[Tensor], **kwargs: Any) -> Tensor:
    return _sums(vector, len(old_dirs) + len(old_stps))


def _pair(
    y: Tensor,
    s: Tensor,
    grad: Tensor,
    prev_grad: Tensor,
    d: Tensor,
    old_dirs: list[Tensor],
    old_stps: list[Tensor],
    **kwargs: Any,
) -> Tensor:
    return _sums(grad, 2 * (len(old_dirs) + len(old_stps) + 2))


def _combine(d: Tensor, grad: Tensor, old_dirs: list[Tensor], old_stps: list[Tensor], **kwargs: Any) -> Tensor:
    return _sums(grad, 3)


torch.library.register_fake("optim_ext::lbfgs_norms", _norms)
torch.library.register_fake("optim_ext::lbfgs_dots", _dots)
torch.library.register_fake("optim_ext::lbfgs_pair_", _pair)
torch.library.register_fake("optim_ext::lbfgs_combine_", _combine)
