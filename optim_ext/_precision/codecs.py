"""The codecs of csrc/storage for whole tensors: for state that is converted, loaded or shown, not stepped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 64
_NOT_FINITE = 255


def dense_strides(p: Tensor) -> tuple[int, ...]:
    """The strides of a tensor without gaps in the memory order of ``p``."""
    return p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()


def like(p: Tensor, value: Tensor) -> Tensor:
    """A value of the parameter's shape with its elements in the parameter's memory order, without gaps."""
    if value.device == p.device and value.stride() == dense_strides(p):
        return value
    return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


def join_remainder(p: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 parameter and its int16 remainder."""
    return (p.detach().float().view(torch.int32) + remainder.to(torch.int32)).view(torch.float32)


def half_of_master(master: Tensor) -> Tensor:
    """The bfloat16 parameter of a float32 master that has a remainder: the nearest, ties away from zero."""
    bits = torch.where(master.isnan(), torch.full_like(master, torch.nan), master).view(torch.int32)
    return ((bits.to(torch.int64) + 0x8000) >> 16 << 16).to(torch.int32).view(torch.float32).bfloat16()


def remainder_of(p: Tensor, master: Tensor) -> Tensor:
    """The int16 that makes the parameter its master again; the nearest one where the two are further apart."""
    distance = master.view(torch.int32).to(torch.int64) - p.detach().float().view(torch.int32)
    return distance.clamp_(-(1 << 15), (1 << 15) - 1).to(torch.int16)


def encode(p: Tensor, value: Tensor, positive: bool) -> tuple[Tensor, Tensor]:
    """Codes and exponents of a state in blocks of 64 within each row, to nearest.

    Returns:
        uint8 of the parameter's shape, and uint8 of shape ``(rows, ceil(elements of a row / 64))``.
    """
    bits = _by_blocks(p, value.float()).view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    largest = magnitude.amax(-1, keepdim=True)
    exponent = ((largest.long() + 0xFFFFF) >> 23).clamp_(32, _NOT_FINITE - 1)
    exponent.masked_fill_(largest >= 0x7F800000, _NOT_FINITE)
    codes = (magnitude - ((exponent - (31 if positive else 15)) << 23) + 0x80000) >> 20
    if positive:
        codes = codes.clamp_(1, 255).masked_fill_(magnitude == 0, 0)
    else:
        codes = codes.clamp_(0, 127) | ((bits >> 24) & 0x80)
    return _from_blocks(p, codes.to(torch.uint8)), exponent.squeeze(-1).to(torch.uint8)


def decode(p: Tensor, codes: Tensor, exponents: Tensor, positive: bool) -> Tensor:
    """The float32 values of a state in 8 bits."""
    code = _by_blocks(p, codes).to(torch.int32)
    exponent = exponents.to(torch.int32).unsqueeze(-1)
    magnitude = code if positive else code & 0x7F
    bits = (magnitude << 20) + ((exponent - (31 if positive else 15)) << 23)
    bits = bits.masked_fill_(magnitude == 0, 0)
    value = bits.view(torch.float32)
    value = value if positive else torch.where((code & 0x80) != 0, -value, value)
    return _from_blocks(p, value.masked_fill_(exponent == _NOT_FINITE, torch.nan))


def blocks_of_row(shape: Sequence[int]) -> int:
    """How many blocks an index of the first dimension has."""
    return -(-math.prod(shape[1:]) // BLOCK)


def _by_blocks(p: Tensor, value: Tensor) -> Tensor:
    """Rows in blocks of 64 elements in memory order, the last of each filled up with zeros: (rows, blocks, 64)."""
    rows, of_row = p.shape[0], math.prod(p.shape[1:])
    flat = torch.as_strided(like(p, value), (rows, of_row), (of_row, 1))
    return torch.nn.functional.pad(flat, (0, -of_row % BLOCK)).view(rows, blocks_of_row(p.shape), BLOCK)


def _from_blocks(p: Tensor, blocks: Tensor) -> Tensor:
    rows, of_row = p.shape[0], math.prod(p.shape[1:])
    made = torch.empty_like(p, dtype=blocks.dtype, requires_grad=False)
    torch.as_strided(made, (rows, of_row), (of_row, 1)).copy_(blocks.reshape(rows, blocks.shape[1] * BLOCK)[:, :of_row])
    return made
