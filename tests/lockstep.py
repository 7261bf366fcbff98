"""Two optimizers side by side: ours, and torch's class of the same name, over equal parameters and equal gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from device import DEVICE
from specs import Options, Spec, Tolerance
from torch import Tensor

from optim_ext._tables import TABLES

Device = torch.device | str

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (0,), (3, 5), (2, 3, 4), (17, 33))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(shape: Sequence[int], dtype: torch.dtype, seed: int, device: Device = DEVICE) -> Tensor:
    """Normal numbers, the same on every device, and for every dtype of one kind but for rounding."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    make = _few_numbers if math.prod(shape) <= 1024 else _numbers
    return make(tuple(shape), wide, seed).to(device, dtype, copy=True)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


# The gradients of most tests are those of others, and beginning a generator takes longer than drawing a few numbers from it.
_few_numbers = functools.lru_cache(maxsize=4096)(_numbers)


def make_params(
    shapes: Iterable[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: Device = DEVICE,
) -> list:
    return [torch.nn.Parameter(random(shape, dtype, seed + i, device)) for i, shape in enumerate(shapes)]


def twin(params: Iterable[Tensor]) -> list[Tensor]:
    """Parameters equal to these, strides included, in memory of their own."""
    twins = []
    for param in params:
        copy = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=param.device)
        copy.copy_(param.detach())
        twins.append(torch.nn.Parameter(copy) if isinstance(param, torch.nn.Parameter) else copy)
    return twins


def give_grads(params: Iterable[Tensor], step: int, frozen: Iterable[int] = ()) -> None:
    """Gradients that depend on the step and the place in the list only."""
    for i, param in enumerate(params):
        seed = 1000 * (step + 1) + i
        param.grad = None if i in frozen else random(param.shape, param.dtype, seed, param.device)


def copy_of(options: Options, device: Device | None = None) -> Options:
    """The same options with tensors of their own, so that two optimizers do not share a learning rate; moved to the
    device if there is one."""

    def own(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(own(entry) for entry in value)
        return value.clone().to(device or value.device) if isinstance(value, Tensor) else value

    return {key: own(value) for key, value in options.items()}


def widen_hypers(optimizer: torch.optim.Optimizer) -> None:
    """Give torch its tensor hyper-parameters in double, as our ops read them. In float32 torch's own arithmetic on them
    (1 - lr * weight_decay, 1 - beta1**step) loses more than anything compared here."""

    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(wide(entry) for entry in value)
        return value.double() if isinstance(value, Tensor) else value

    for options in (optimizer.defaults, *optimizer.param_groups):
        options.update({key: wide(value) for key, value in options.items() if key != "params"})


def assert_close(ours: Tensor, theirs: Tensor, tolerance: Tolerance, what: str = "") -> None:
    ours, theirs = ours.detach(), theirs.detach()
    alike = (ours.dtype, ours.device, ours.layout) == (theirs.dtype, theirs.device, theirs.layout)
    if alike and ours.layout == torch.strided and torch.equal(ours, theirs):
        return  # a tenth of what assert_close takes to find the same
    torch.testing.assert_close(
        ours,
        theirs,
        rtol=tolerance.rtol,
        atol=tolerance.atol,
        equal_nan=True,
        check_stride=False,
        msg=lambda text: f"{what}: {text}",
    )


def assert_same_state(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, tolerance: Tolerance, one_was_loaded: bool = False
) -> None:
    """State of both, in state_dict's form: the same keys everywhere, values within the tolerance, steps exactly. Loading
    keeps the precision of numbers that torch casts to the parameter's; it moves them to its device, as torch does."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert mine["param_groups"] == other["param_groups"]
    assert [group.keys() for group in mine["param_groups"]] == [group.keys() for group in other["param_groups"]]
    assert mine["state"].keys() == other["state"].keys()
    for index, entries in other["state"].items():
        assert mine["state"][index].keys() == entries.keys(), index
        for key, value in entries.items():
            found = mine["state"][index][key]
            assert type(found) is type(value), (index, key)
            if not isinstance(value, Tensor):
                assert found == value, (index, key)
                continue
            native = getattr(ours, "_op", None)  # state may also be compared between two optimizers of torch or of ours
            if native is not None and key in TABLES[native].scalar_state - {"step"}:
                found = found.to(value.dtype)
            if one_was_loaded and key != "step":
                found = found.to(value.device)
            assert (found.dtype, found.device, found.shape) == (value.dtype, value.device, value.shape), (index, key)
            assert_close(found, value, Tolerance(0, 0) if key == "step" else tolerance, f"state {index} {key}")


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything a step may change, by value, down to the bits, and by identity."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [(id(key), dict(entries)) for key, entries in optimizer.state.items() if isinstance(entries, dict)]
    return {
        "params": [(id(p), p.data_ptr(), bits(p)) for p in params],
        "grads": [None if p.grad is None or p.grad.layout != torch.strided else bits(p.grad) for p in params],
        "state": [
            (owner, {key: (id(value), bits(value)) if isinstance(value, Tensor) else value for key, value in d.items()})
            for owner, d in state
        ],
    }


def bits(tensor: Tensor) -> Any:
    """Value, dtype and shape, comparable with == (NaN equals NaN, 0 differs from -0)."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return (str(tensor.dtype), tuple(tensor.shape), str(tensor.layout), tensor.device.type)
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return (str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).cpu().numpy().tobytes())


class Lockstep:
    """Drives both optimizers through the same steps. `groups` maps a list of parameters to what the constructor is
    given; by default that is the list itself."""

    def __init__(
        self,
        spec: Spec,
        options: Options | None = None,
        params: list[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        groups: Callable[[list[Tensor]], Any] = lambda params: params,
        device: Device = DEVICE,
    ) -> None:
        self.spec = spec
        options = spec.typical if options is None else options
        self.params = make_params(dtype=dtype, device=device) if params is None else params
        self.twins = twin(self.params)
        self.ours = spec.ours(groups(self.params), **copy_of(options))
        self.theirs = spec.torch(groups(self.twins), **copy_of(options))
        widen_hypers(self.theirs)
        self.taken = 0

    @property
    def both(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return self.ours, self.theirs

    def step(self, count: int = 1, frozen: Iterable[int] = ()) -> Lockstep:
        frozen = set(frozen)
        for _ in range(count):
            give_grads(self.params, self.taken, frozen)
            give_grads(self.twins, self.taken, frozen)
            for optimizer in self.both:
                optimizer.step()
            self.taken += 1
        return self

    def tolerance(self) -> Tolerance:
        """The loosest among the dtypes at hand."""
        return max((self.spec.tolerances[p.dtype] for p in self.params), key=lambda t: t.rtol)

    def check(self, tolerance: Tolerance | None = None) -> Lockstep:
        tolerance = tolerance or self.tolerance()
        for i, (mine, other) in enumerate(zip(self.params, self.twins, strict=True)):
            assert_close(mine, other, tolerance, f"parameter {i} after {self.taken} steps")
        assert_same_state(self.ours, self.theirs, tolerance)
        return self


def check_in_half_precision(spec: Spec, options: Options, dtype: torch.dtype, device: Device = DEVICE) -> None:
    """Torch rounds to 16 bits after each of its operations, ours once a step: the two are no farther apart than torch's
    largest error against double allows, parameters and state alike."""
    options = spec.for_dtype(options, dtype)
    start = make_params(dtype=dtype, device=device)
    truth = Lockstep(spec, options, params=[torch.nn.Parameter(p.detach().double()) for p in start])
    lockstep = Lockstep(spec, options, params=start)
    for step in range(5):
        give_grads(lockstep.params, step)
        for own in (lockstep.twins, truth.twins):
            for param, giver in zip(own, lockstep.params, strict=True):
                param.grad = giver.grad.to(param.dtype)
        for optimizer in (*lockstep.both, truth.theirs):
            optimizer.step()

    def every(optimizer: torch.optim.Optimizer, params: list[Tensor], key: str | None) -> Tensor:
        tensors = params if key is None else [e[key] for e in map(optimizer.state.get, params) if e and key in e]
        return torch.cat([t.detach().double().flatten() for t in tensors])

    for key in (None, *sorted(spec.state(options) - {"step"})):
        exact = every(truth.theirs, truth.twins, key)
        ours, theirs = every(lockstep.ours, lockstep.params, key), every(lockstep.theirs, lockstep.twins, key)
        one_rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - theirs).abs().max() <= 2.05 * (theirs - exact).abs().max() + one_rounding, key


def native_ops(run: Callable[[], Any]) -> list[str]:
    """Names of this library's ops that ran, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return [event.name for event in profile.events() if event.name.startswith("optim_ext::")]
