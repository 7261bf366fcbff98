"""bitsandbytes.optim, in 32 bits and in 8, blockwise or (older versions) by one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from optim_ext._peers.assembling import Found, assembled, check_layout, check_optimizer, each_entry
from optim_ext._step import FusedStep

# Under which keys ours keep what bitsandbytes calls state1 and state2.
_KEYS: Final = {
    "adam_": ("exp_avg", "exp_avg_sq"),
    "adamw_": ("exp_avg", "exp_avg_sq"),
    "lamb_": ("exp_avg", "exp_avg_sq"),
    "lion_": ("exp_avg",),
    "sgd_": ("momentum_buffer",),
    "lars_": ("momentum_buffer",),
    "rmsprop_": ("square_avg",),
    "adagrad_": ("sum",),
}
# Under which options ours have what bitsandbytes keeps as betas.
_BETAS: Final = {"sgd_": ("momentum", "dampening"), "lars_": ("momentum",), "rmsprop_": ("alpha",), "adagrad_": ()}
_BLOCKS: Final = (256, 2048)  # elements of one, by version
_WRAPPED: Final = "__bnb_optimizer_quant_state__"


def from_bitsandbytes(state_dict: Mapping[str, Any], optimizer: FusedStep) -> dict[str, Any]:
    """The state of an optimizer of ``bitsandbytes.optim``, in 32 or 8 bits, as a state_dict that ``optimizer`` loads:
    state in 8 bits is float32 in it, whatever ``optimizer`` then keeps it in. bitsandbytes itself is not needed.

    Args:
        state_dict: what ``state_dict()`` of its Adam, AdamW, LAMB, Lion, SGD, LARS, RMSprop or Adagrad returned.
        optimizer: this package's optimizer of the same name over the same parameters in the same groups; it is not
            written to. Options that the checkpoint has not stay its own.

    Raises:
        TypeError: ``optimizer`` is none of this package's, or of a class that bitsandbytes does not have.
        ValueError: another layout, or other parameters; by the parameter's name.
    """
    check_optimizer("from_bitsandbytes", optimizer)
    op = optimizer._op
    if op not in _KEYS:
        raise TypeError(f"bitsandbytes has no {type(optimizer).__name__}, whose state could be taken")
    check_layout("from_bitsandbytes", state_dict, "the state_dict() of bitsandbytes, with 'state' and 'param_groups'")
    found = {}
    for number, index, _, entry in each_entry(optimizer, state_dict):
        where = optimizer._described(optimizer.param_groups[number], index)
        flat = {**entry, **entry.get(_WRAPPED, {})}
        if "state1" not in flat:
            raise ValueError(
                f"{where}: its state has {', '.join(map(repr, flat))}, expected 'state1' as bitsandbytes has"
            )
        names = [name for name in ("state1", "state2") if flat.get(name) is not None]
        if len(names) != len(_KEYS[op]):
            raise ValueError(
                f"{where}: the checkpoint keeps {len(names)} tensors for it, {type(optimizer).__name__} "
                f"{len(_KEYS[op])}: it is of another optimizer"
            )
        values = {key: _value(flat, name[-1], f"{where}: {name!r}") for key, name in zip(_KEYS[op], names, strict=True)}
        found[number, index] = Found(values, flat.get("step"))

    def options(number: int) -> dict[str, Any]:
        its = state_dict["param_groups"][number]
        taken = {name: its[name] for name in ("lr", "eps", "weight_decay") if name in its}
        if "betas" in its:
            own = _BETAS.get(op)
            taken |= {"betas": tuple(its["betas"][:2])} if own is None else dict(zip(own, its["betas"], strict=False))
        return taken

    return assembled(optimizer, found, options)


def _value(entry: Mapping[str, Any], which: str, what: str) -> Tensor:
    codes: Tensor = entry[f"state{which}"]
    if codes.dtype is not torch.uint8:
        return codes
    table, scales = entry.get(f"qmap{which}"), entry.get(f"absmax{which}", entry.get(f"max{which}"))
    if table is None or scales is None:
        missing = f"qmap{which}" if table is None else f"absmax{which}"
        raise ValueError(f"{what} is in 8 bits, but {missing!r} is missing: save the whole state_dict")
    # Blocks go through memory, whatever the order of the dimensions.
    value = torch.empty_like(codes, dtype=torch.float32)
    flat, read = (t.as_strided((t.numel(),), (1,)) for t in (value, codes))
    torch.index_select(table.float(), 0, read.int(), out=flat)
    blocks = scales.numel()
    size = next((size for size in _BLOCKS if -(-codes.numel() // size) == blocks), None)
    if f"absmax{which}" not in entry:
        size = codes.numel()
    elif size is None:
        raise ValueError(f"{what} has {blocks} scales for {codes.numel()} elements, expected one for 256 or 2048")
    flat.mul_(scales.float().repeat_interleave(size)[: flat.numel()])
    return value
