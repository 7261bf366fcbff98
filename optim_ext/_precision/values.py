"""Parameters and state as numbers, whatever they are kept in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from optim_ext import _sharding
from optim_ext._precision import codecs, options
from optim_ext._precision.options import CODES, PLACE, ROUNDING_KEY, SCALE, TWINS

TWIN_KEYS: Final = frozenset({*(key for key, _ in TWINS.values()), ROUNDING_KEY, PLACE})


def is_ours(key: str) -> bool:
    """Whether a state key is none of torch's: of a companion, or of a state in 8 bits."""
    return key in TWIN_KEYS or key.endswith((CODES, SCALE))


def as_kept(p: Tensor, key: str, value: Tensor, precision: str) -> dict[str, Tensor]:
    """A state in the form it is to be kept in."""
    if precision == "q8":
        codes, scale = codecs.encode(p, value, options.has_no_sign(key))
        return {key + CODES: codes, key + SCALE: scale}
    value = value.to({"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, p.dtype))
    return {key: codecs.like(p, value) if value.shape == p.shape else value.contiguous()}


def param_value(p: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """What parameter and twin are together, in float32, whichever twin there is: of a DTensor this process's part."""
    twins = (found if is_twin(p, precision, found := entry.get(TWINS[precision][0])) else None for precision in TWINS)
    master, remainder, lost = (_sharding.local(twin) if isinstance(twin, Tensor) else None for twin in twins)
    p = _sharding.local(p)
    value = p.float()
    if isinstance(master, Tensor):
        return torch.where(master.to(p.dtype) == p, master, value)
    if isinstance(remainder, Tensor):
        return codecs.join_remainder(p, remainder)
    return value + lost.float() if isinstance(lost, Tensor) else value


def has_twin(p: Tensor, entry: Mapping[str, Any]) -> bool:
    """Whether a parameter is kept in something besides itself."""
    return any(is_twin(p, precision, entry.get(key)) for precision, (key, _) in TWINS.items())


def is_twin(p: Tensor, precision: str, found: Any) -> bool:
    """Whether this is what a parameter is kept in besides itself; what is not is made anew."""
    return isinstance(found, Tensor) and found.dtype is (TWINS[precision][1] or p.dtype) and found.shape == p.shape


def is_in_blocks(p: Tensor, entry: Mapping[str, Any], key: str) -> bool:
    """Whether a state is kept in 8 bits, as an op takes it."""
    codes, scale = entry.get(key + CODES), entry.get(key + SCALE)
    if not (isinstance(codes, Tensor) and isinstance(scale, Tensor) and p.dim() > 0):
        return False
    return (
        codes.dtype is scale.dtype is torch.uint8
        and codes.stride() == codecs.dense_strides(p)
        and codes.shape == p.shape
        and scale.shape == (p.shape[0], codecs.blocks_of_row(p.shape))
        and scale.is_contiguous()
    )


def state_value(p: Tensor, entry: Mapping[str, Any], key: str) -> Tensor | None:
    """A state whatever it is kept in: from 8 bits in float32; None where there is none."""
    if key + CODES in entry and key + SCALE in entry:
        part, codes, scale = (_sharding.local(tensor) for tensor in (p, entry[key + CODES], entry[key + SCALE]))
        decoded = codecs.decode(part, codes, scale, options.has_no_sign(key))
        return _sharding.wrapped(decoded, p) if _sharding.is_dtensor(p) else decoded
    value = entry.get(key)
    return value if isinstance(value, Tensor) else None


def twin_of(p: Tensor, precision: str, value: Tensor) -> Tensor:
    """What makes a parameter a float32 value that it is the nearest to."""
    if precision == "master":
        return codecs.like(p, value.clone())
    if precision == "remainder":
        return codecs.like(p, codecs.remainder_of(p, value))
    lost = torch.where(p.detach().isfinite(), value - p.detach().float(), 0.0)
    return codecs.like(p, lost.to(p.dtype))
