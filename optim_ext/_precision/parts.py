"""Parts of parameters that are DTensors: what is judged by the whole, where a part is in it, and state in blocks of it.

What is said here of a layout depends on nothing else, so that all processes come to the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from optim_ext import _sharding
from optim_ext._precision import codecs
from optim_ext._precision.options import ROUNDING_KEY, SCALE, Keeping

USE_NO_CHANCE = (
    "use param_precision 'master', 'remainder' or 'kahan' and state_precision 'native' or 'fp32', which take no chance"
)


def whole_of(dtensor: Any) -> Tensor:
    """A tensor without memory that is like the whole: of its shape, dtype and order of memory."""
    meta = dtensor._spec.tensor_meta
    strided = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
    return strided if strided.is_contiguous() else torch.empty_like(strided)


def why_not(keeping: Keeping, dtensor: Any, steps_wholes: bool) -> str | None:
    """Why a parameter's parts cannot be kept in this way with the bits of the whole; None where they can.

    Words of chance belong to an element's place in the whole, and blocks are those of the whole.

    steps_wholes: whether the rule steps whole tensors, so that parts need not say where they are.
    """
    spec = dtensor._spec
    if keeping.by_chance and not steps_wholes and not _says_where(spec):
        return f"its {_sharding.described(spec)} do not say where its parts are in the whole, which chance goes by; {USE_NO_CHANCE}"
    if not keeping.has_blocks:
        return None
    local = _sharding.local_part(dtensor)
    if not whole_of(dtensor).is_contiguous() or not (local is None or _is_in_order(local)):
        return (
            "state in 8 bits is in blocks of the whole in its order of memory, which has to be that of contiguous(), also in "
            "its parts; make it so"
        )
    if _blocks_of_row(spec) is None:
        return (
            f"its {_sharding.described(spec)} cut blocks of {codecs.BLOCK} elements, which share an exponent if "
            "state_precision is 'q8'; cut its first dimension, or another in pieces of whole blocks, or use 'bf16' or "
            "'fp32' for it"
        )
    return None


def place_of(dtensor: Any) -> Tensor | None:
    """Where this process's part is in the whole, as the ops take it (csrc/kernels/operand.h): int64, on the host, which
    reads it. None where it is the whole.

    Raises:
        RuntimeError: the part has another shape than the layout says.
    """
    spec = dtensor._spec
    if not _sharding.is_cut(spec):
        return None
    local: Tensor = dtensor._local_tensor
    if local.numel() == 0:
        return torch.tensor([0, 0, 1], device="cpu")
    offsets, sizes = _extent(spec)
    if tuple(local.shape) != sizes:
        raise RuntimeError(
            f"its part has shape {tuple(local.shape)}, expected {sizes} of its {_sharding.described(spec)}"
        )
    strides, own = whole_of(dtensor).stride(), codecs.dense_strides(local)
    dims: list[tuple[int, int]] = []
    for d in sorted((d for d in range(local.dim()) if sizes[d] > 1), key=lambda d: -own[d]):
        if dims and dims[-1][1] == sizes[d] * strides[d]:  # the two are walked as one
            dims[-1] = dims[-1][0] * sizes[d], strides[d]
        else:
            dims.append((sizes[d], strides[d]))
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    return torch.tensor([first, *(number for dim in dims or [(1, 1)] for number in dim)], device="cpu")


def local_entry(dtensor: Any, entry: Mapping[str, Any], scalars: Collection[str]) -> dict[str, Any] | None:
    """What this process has of a parameter's state; None where that is not laid out as the parameter.

    scalars: keys of state that is a number, or has others than a number for each element.
    """
    if _sharding.local_part(dtensor) is None:
        return None
    seen = {}
    for key, value in entry.items():
        if _sharding.is_dtensor(value):
            spec = scale_spec(dtensor) if key.endswith(SCALE) else dtensor._spec
            if key not in scalars and not _sharding.is_alike(value._spec, spec):
                return None
            value = _sharding.local(value)
        elif isinstance(value, Tensor) and value.dim() > 0 and key not in scalars and key != ROUNDING_KEY:
            return None
        seen[key] = value
    return seen


def wrapped(key: str, value: Any, dtensor: Any, before: Any = None) -> Any:
    """State as the optimizer has it, of which this process has ``value``, in the place of ``before``."""
    if key == ROUNDING_KEY:
        return value
    # A row or column of it; a part of the parameter may have the same shape.
    if _sharding.is_dtensor(before) and not key.endswith(SCALE) and before.shape != dtensor.shape:
        return _sharding.wrapped_copy(value.detach(), dtensor)
    return (wrapped_scale if key.endswith(SCALE) else _sharding.wrapped)(value.detach(), dtensor)


def scale_spec(dtensor: Any) -> Any:
    """How the exponents of a state in 8 bits are laid out beside a parameter: cut where their blocks are."""
    from torch.distributed.tensor import Shard

    spec = dtensor._spec
    blocks = _blocks_of_row(spec) or 0
    shape = torch.Size((spec.tensor_meta.shape[0], blocks))
    placements = tuple(Shard(1) if place.is_shard() and place.dim > 0 else place for place in spec.placements)
    return type(spec)(spec.mesh, placements, tensor_meta=type(spec.tensor_meta)(shape, (blocks, 1), torch.uint8))


def wrapped_scale(local: Tensor, dtensor: Any) -> Any:
    """The exponents of which this process has ``local``, as a DTensor beside parameter ``dtensor``."""
    return type(dtensor)(local, scale_spec(dtensor), requires_grad=False)


def _is_in_order(local: Tensor) -> bool:
    """Whether its elements lie in the order of their indices, gaps or not."""
    return local.is_contiguous() or torch.empty_like(local, device="meta").is_contiguous()


def _says_where(spec: Any) -> bool:
    """Whether each dimension of the mesh, in turn, cuts what those before it have left in chunks."""
    from torch.distributed.tensor import Shard

    plain = all(
        place.is_replicate() or type(place) is Shard or spec.mesh.size(dim) == 1
        for dim, place in enumerate(spec.placements)
    )
    usual = type(spec)(spec.mesh, spec.placements, tensor_meta=spec.tensor_meta)
    return plain and getattr(spec, "shard_order", None) == getattr(usual, "shard_order", None)


def _extent(spec: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this process's part begins in each dimension, and its sizes."""
    sizes = list(spec.tensor_meta.shape)
    offsets = [0] * len(sizes)
    for place, count, coordinate in zip(spec.placements, spec.mesh.shape, spec.mesh.get_coordinate(), strict=True):
        if place.is_replicate():
            continue
        chunk = -(-sizes[place.dim] // count)
        begin = min(chunk * coordinate, sizes[place.dim])
        offsets[place.dim] += begin
        sizes[place.dim] = min(chunk, sizes[place.dim] - begin)
    return tuple(offsets), tuple(sizes)


def _blocks_of_row(spec: Any) -> int | None:
    """How many blocks an index of the first dimension has; None where the layout cuts one."""
    shape = spec.tensor_meta.shape
    blocks = codecs.blocks_of_row(shape)
    cuts = [
        (place.dim, count)
        for place, count in zip(spec.placements, spec.mesh.shape, strict=True)
        if not place.is_replicate() and count > 1 and place.dim > 0
    ]
    if not cuts:
        return blocks
    dim, count = cuts[0]
    if len(cuts) > 1 or math.prod(shape[1:dim]) != 1:
        return None
    elements = -(-shape[dim] // count) * math.prod(shape[dim + 1 :])  # of a row in a part
    are_whole = elements % codecs.BLOCK == 0 and elements // codecs.BLOCK == -(-blocks // count)
    return blocks if are_whole else None
