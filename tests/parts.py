"""What each process has of a tensor whose whole all of them know: parts are made and compared without a word between them."""

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard


def spread(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """The whole as a DTensor. A strided shard is what FSDP makes of a part that tensor parallelism has cut."""
    if not any(isinstance(place, _StridedShard) for place in placements):
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)
    outer, inner = mesh.get_coordinate()
    part = whole.chunk(mesh.size(1))[inner].chunk(mesh.size(0))[outer].clone()
    return DTensor.from_local(part, mesh, placements, shape=whole.shape, stride=whole.stride())


def part_of(tensor: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What this process has of ``tensor``, and the same of ``whole``, which may be laid out like it or known here."""
    if not isinstance(tensor, DTensor):
        return tensor, whole
    assert tuple(tensor.shape) == tuple(whole.shape)
    if not isinstance(whole, DTensor):
        whole = spread(whole, tensor.device_mesh, tensor.placements)
    assert (whole.device_mesh, whole.placements) == (tensor.device_mesh, tensor.placements)
    return tensor._local_tensor, whole._local_tensor
