"""The same small training beside torch.optim, whatever the framework: data, network, and what has to come out alike."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optim_ext

PACKAGES = {"torch": torch.optim, "ours": optim_ext}

# A checkpoint: whose class writes it, and whose goes on from it.
WAYS = list(product(PACKAGES, repeat=2))
four_ways = pytest.mark.parametrize("writer, reader", WAYS, ids=[" to ".join(way) for way in WAYS])

# Torch rounds after each of its operations: over some dozens of steps of networks this small, in float32.
NEAR = {"rtol": 1e-4, "atol": 1e-5}
# Where the network computes in 16 bits, a parameter that differs in its last bit may round to the next number. Where the
# parameters themselves are bfloat16, they may be one such number apart.
NEAR_IN_HALF = {"rtol": 4e-3, "atol": 4e-3}
NEAR_IN_BFLOAT16 = {"rtol": 2**-6, "atol": 2**-7}

FEATURES, CLASSES = 12, 4


@dataclass
class Run:
    """What a training leaves behind. `optimizer` is the one the framework was given, without its wrapper."""

    losses: list[float]
    params: list[Tensor]
    optimizer: torch.optim.Optimizer


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, CLASSES))


def samples(count: int = 96) -> tuple[Tensor, Tensor]:
    """Points and the classes they belong to, which a network can learn."""
    numbers = torch.Generator().manual_seed(3)
    points = torch.randn(count, FEATURES, generator=numbers)
    return points, (points @ torch.randn(FEATURES, CLASSES, generator=numbers)).argmax(1)


def batches(size: int = 16) -> list[tuple[Tensor, Tensor]]:
    points, classes = samples()
    return list(zip(points.split(size), classes.split(size), strict=True))


def loss_of(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    points, classes = batch
    return nn.functional.cross_entropy(model(points), classes)


def both(train: Callable[..., Run], *args: Any, **options: Any) -> tuple[Run, Run]:
    """One training by this package's classes and by torch's."""
    return train(optim_ext, *args, **options), train(torch.optim, *args, **options)


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def assert_near(found: Iterable[Tensor], expected: Iterable[Tensor], tolerance: dict[str, float] = NEAR) -> None:
    for i, (mine, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(mine, other, **tolerance, msg=lambda text, i=i: f"tensor {i}: {text}")


def assert_alike(ours: Run, theirs: Run, tolerance: dict[str, float] = NEAR) -> None:
    """The losses, parameters and keys of the state of one training that learns, each by its own classes."""
    assert_native(ours.optimizer)
    assert type(theirs.optimizer).__module__.startswith("torch.optim.")
    assert min(theirs.losses) < theirs.losses[0]
    assert_near(torch.tensor(ours.losses).unbind(), torch.tensor(theirs.losses).unbind(), tolerance)
    assert_near(ours.params, theirs.params, tolerance)
    mine, other = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert [group.keys() for group in mine["param_groups"]] == [group.keys() for group in other["param_groups"]]
    assert {i: e.keys() for i, e in mine["state"].items()} == {i: e.keys() for i, e in other["state"].items()}


def assert_same(one: Run, other: Run) -> None:
    """Down to the bits."""
    assert one.losses == other.losses
    assert len(one.params) == len(other.params)
    assert all(torch.equal(p, q) for p, q in zip(one.params, other.params, strict=True))


def assert_native(optimizer: Any) -> None:
    """It is this package's, and has stepped natively."""
    assert type(optimizer).__module__.startswith("optim_ext.")
    assert all(report.native for report in optim_ext.explain(optimizer))


def assert_resumed(resumed: Run, straight: Run, same_package: bool) -> None:
    """A run that went on from a checkpoint ends as the one without a break: in every bit, if one package did both."""
    assert 0 < len(resumed.losses) < len(straight.losses)
    if same_package:
        assert resumed.losses == straight.losses[-len(resumed.losses) :]
        assert all(torch.equal(p, q) for p, q in zip(resumed.params, straight.params, strict=True))
    assert_near(resumed.params, straight.params)
