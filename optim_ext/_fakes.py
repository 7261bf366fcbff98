"""Fake kernels: what tracing (torch.compile, FakeTensorMode) needs to know of the ops."""

from __future__ import annotations

from typing import Any

import torch

from optim_ext._load import _C


def _updates_in_place(*args: Any, **kwargs: Any) -> None:
    """Every op here writes into its arguments, as its schema says, and returns nothing."""


for _op in _C.ops():
    torch.library.register_fake(f"optim_ext::{_op}", _updates_in_place)
