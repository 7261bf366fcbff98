"""torchao.optim: Adam and AdamW in 8 and 4 bits and in float8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim_ext._peers.assembling import Found, assembled, check_layout, check_optimizer, each_entry
from optim_ext._step import FusedStep

_KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "amsgrad")


def from_torchao(state_dict: Mapping[str, Any], optimizer: FusedStep) -> dict[str, Any]:
    """The state of ``torchao.optim``'s Adam8bit, Adam4bit, AdamFp8 or of an AdamW of these, as a state_dict that
    ``optimizer`` loads: state in few bits is float32 in it, whatever ``optimizer`` then keeps it in.

    Args:
        state_dict: what ``state_dict()`` of torchao's optimizer returned. Reading one from a file needs torchao.
        optimizer: an ``Adam`` or ``AdamW`` of this package over the same parameters in the same groups; it is not
            written to. Options that the checkpoint has not stay its own.

    Raises:
        TypeError: ``optimizer`` is none of this package's.
        ValueError: another layout, other parameters, or sharded state; by the parameter's name.
    """
    check_optimizer("from_torchao", optimizer)
    check_layout(
        "from_torchao",
        state_dict,
        "the state_dict() of torchao's Adam8bit, Adam4bit, AdamFp8 and their AdamW, with 'state' and 'param_groups' (of a "
        "CPUOffloadOptimizer that of the optimizers in it)",
    )
    found = {}
    for number, index, _, entry in each_entry(optimizer, state_dict):
        where = optimizer._described(optimizer.param_groups[number], index)
        values = {key: _value(entry[key], f"{where}: {key!r}") for key in _KEYS if entry.get(key) is not None}
        found[number, index] = Found(values, entry.get("step"))
    groups = state_dict["param_groups"]
    return assembled(optimizer, found, lambda number: {k: groups[number][k] for k in _OPTIONS if k in groups[number]})


def _value(value: Any, what: str) -> Tensor:
    if hasattr(value, "to_local") or type(value) in (Tensor, torch.nn.Parameter):
        return value  # type: ignore[no-any-return]
    if not (hasattr(value, "codes") and hasattr(value, "scale")):
        raise ValueError(f"{what} is a {type(value).__name__}, expected a tensor or a state of torchao in few bits")
    dequantized: Tensor = value.dequantize(output_dtype=torch.float32)
    return dequantized
