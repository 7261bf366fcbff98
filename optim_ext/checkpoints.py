"""State of optimizers in and out of the forms that other programs have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from optim_ext._peers.apex import from_apex as from_apex
from optim_ext._peers.bitsandbytes import from_bitsandbytes as from_bitsandbytes
from optim_ext._peers.deepspeed import from_deepspeed as from_deepspeed
from optim_ext._peers.torchao import from_torchao as from_torchao
from optim_ext._precision import options, values
from optim_ext._step import FusedStep
from optim_ext._step.lazy import LAZY_ROWS
from optim_ext._tables import TABLES

__all__ = [
    "from_apex",
    "from_bitsandbytes",
    "from_deepspeed",
    "from_torchao",
    "master_state_dict",
    "to_torch_state_dict",
]


def to_torch_state_dict(optimizer: FusedStep) -> dict[str, Any]:
    """The state of an optimizer as torch's class of the same name has it: ``optimizer.state_dict()`` without what
    ``param_precision`` and ``state_precision`` add.

    State in 8 bits is float32 here. What is kept beside parameters is left out: take it with
    :func:`master_state_dict`.

    Raises:
        TypeError: ``optimizer`` is none of this package's.
    """
    if not isinstance(optimizer, FusedStep):
        raise TypeError(f"to_torch_state_dict takes an optimizer of optim_ext, found {type(optimizer).__name__}")
    saved = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = dict(saved["state"])
    for p, number in zip(params, numbers, strict=True):
        if number not in state:
            continue
        entry = state[number]
        plain = {key: value for key, value in entry.items() if not values.is_ours(key)}
        for key in TABLES[optimizer._op].places:
            value = values.state_value(p, entry, key)
            if value is not None:
                plain[key] = value
        state[number] = plain
    groups = [
        {key: value for key, value in group.items() if key not in options.DEFAULTS and key != LAZY_ROWS}
        for group in saved["param_groups"]
    ]
    return {**saved, "state": state, "param_groups": groups}


def master_state_dict(model: Module, optimizer: FusedStep) -> dict[str, Any]:
    """``model.state_dict()`` with the value that steps see for every parameter that ``optimizer`` steps: float32 for
    one of 16 bits, what is kept beside it included.

    Raises:
        TypeError: ``optimizer`` is none of this package's.
    """
    if not isinstance(optimizer, FusedStep):
        raise TypeError(f"master_state_dict takes an optimizer of optim_ext, found {type(optimizer).__name__}")
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    masters: dict[Tensor, Tensor] = {}
    saved = model.state_dict()
    for name, p in model.named_parameters(remove_duplicate=False):
        if p not in stepped or name not in saved:
            continue
        with torch.no_grad():
            saved[name] = masters.setdefault(p, optimizer._master(p))
    return saved
