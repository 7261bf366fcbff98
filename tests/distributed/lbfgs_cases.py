"""What test_lbfgs_shards.py runs on several processes: see ranks.py. Every process also runs one process's optimizer, on the
whole of all parameters, and follows it."""

import copy
import functools
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parts import part_of, spread
from ranks import serve
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import optim_ext

FOLDER = Path(sys.argv[3] if __name__ == "__main__" else ".")
SEARCH = {"lr": 1.0, "line_search_fn": "strong_wolfe", "max_iter": 4, "history_size": 5}
OPTIONS = [
    SEARCH,
    {"lr": 0.1, "max_iter": 5, "history_size": 3},
    {"lr": 0.2, "max_iter": 3, "damping": 0.2},
    {**SEARCH, "recover": True, "strict_max_eval": True},
    {"lr": 0.1, "max_iter": 4, "history_dtype": torch.bfloat16},
]


@functools.cache
def meshes():
    """By name: the mesh, and by name the placements on it and the whole shape."""
    world = dist.get_world_size()
    rows = {
        "even": ([Shard(0)], (8, 3)),
        "uneven": ([Shard(0)], (5, 3)),
        "empty": ([Shard(0)], (1, 7)),
        "columns": ([Shard(1)], (3, 10)),
        "copies": ([Replicate()], (4, 3)),
    }
    line = init_device_mesh("cpu", (world,))
    found = {"a line": (line, rows), "empty parts": (line, {"empty": ([Shard(0)], (1, 7))})}
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        rows = {
            "hybrid": ([Replicate(), Shard(0)], (6, 3)),
            "uneven hybrid": ([Replicate(), Shard(0)], (5, 3)),
            "rows and columns": ([Shard(0), Shard(1)], (6, 5)),
            "rows then copies": ([Shard(0), Replicate()], (7, 2)),
            "cut twice": ([_StridedShard(0, split_factor=2), Shard(0)], (8, 3)),
            "copies": ([Replicate(), Replicate()], (2, 3)),
        }
        found |= {"a square": (square, rows), "copies": (square, {"hybrid": rows["hybrid"]})}
    return found


def loss_of(tensors):
    """Rosenbrock's function of all elements, one after the other, which couples those of different parameters."""
    x = torch.cat([t.reshape(-1) for t in tensors])
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum() / 100


class Side:
    """Parameters, an optimizer, and a closure that counts how often it was called."""

    def __init__(self, params, options, sign=1.0):
        self.params, self.calls, self.sign = params, 0, sign
        named = list(params.items())
        half = [{"params": named[: len(named) // 2], "lr": 0.5 * options["lr"]}, {"params": named[len(named) // 2 :]}]
        self.optimizer = optim_ext.LBFGS(half if options.get("groups") else named, **without(options, "groups"))

    def closure(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.sign * loss_of(p.full_tensor() if isinstance(p, DTensor) else p for p in self.params.values())
        loss.backward()
        return loss

    def step(self):
        return self.optimizer.step(self.closure)


def without(options, *names):
    return {name: value for name, value in options.items() if name not in names}


def made(mesh, rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, (_, shape) in rows.items()} | {"plain": (4, 2)}
    wholes = {
        name: torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }
    params = {
        name: nn.Parameter(spread(whole.clone(), mesh, rows[name][0]) if name in rows else whole.clone())
        for name, whole in wholes.items()
    }
    return {name: nn.Parameter(whole) for name, whole in wholes.items()}, params


def both(mesh, rows, options, **how):
    wholes, params = made(mesh, rows, how.pop("dtype", torch.float64))
    return Side(wholes, options, **how), Side(params, options, **how)


def assert_follows(sharded, single, rtol=1e-9):
    for name, whole in single.params.items():
        mine, theirs = part_of(sharded.params[name].detach(), whole.detach())
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol, msg=lambda text, n=name: f"{n}: {text}")
    assert sharded.calls == single.calls
    kept, of_one = (next(iter(side.optimizer.state.values())) for side in (sharded, single))
    for key in ("func_evals", "n_iter"):
        assert kept[key] == of_one[key]


def steps_follow_one_process():
    for mesh, rows in meshes().values():
        for options in [*OPTIONS, {**SEARCH, "groups": True}]:
            single, sharded = both(mesh, rows, options)
            assert all(report.native for report in optim_ext.explain(sharded.optimizer))
            rtol = 1e-3 if "history_dtype" in options else 1e-8  # a rounding of bfloat16 is in the direction at once
            for _ in range(4):
                first, mine = single.step(), sharded.step()
                torch.testing.assert_close(mine, first, rtol=rtol, atol=0.0)
                assert_follows(sharded, single, rtol)


def a_maximum_is_found():
    mesh, rows = meshes()["a line"]
    options = {**SEARCH, "maximize": True}
    if "maximize" not in torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]).param_groups[0]:
        return  # torch has it since 2.14
    single, sharded = both(mesh, rows, options, sign=-1.0)
    for _ in range(3):
        single.step(), sharded.step()
        assert_follows(sharded, single, 1e-8)


def copies_stay_the_same_on_all_processes():
    """To the bit: decisions and coefficients are made of the same numbers everywhere."""
    for name in ("a line", "a square") if dist.get_world_size() == 4 else ("a line",):
        mesh, rows = meshes()[name]
        _, sharded = both(mesh, rows, SEARCH, dtype=torch.float32)
        for _ in range(5):
            sharded.step()
        for key in ("plain", "copies"):
            mine = sharded.params[key].detach()
            mine = mine._local_tensor if isinstance(mine, DTensor) else mine
            each = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(each, mine.contiguous())
            assert all(torch.equal(each[0], other) for other in each)


def losses_of_parts_of_the_data_are_averaged():
    """As fully_shard averages gradients: what is minimised is the mean over the processes."""
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(8 * world, n, generator=generator) for n in (6, 3))

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()

    def steps(model, rows):
        optimizer = optim_ext.LBFGS(model.parameters(), **SEARCH)

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs[rows].double()), targets[rows].double())
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        return next(iter(optimizer.state.values()))

    single, model = network(), network()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    of_one, kept = steps(single, slice(None)), steps(model, slice(8 * rank, 8 * rank + 8))
    assert kept["func_evals"] == of_one["func_evals"]
    for p, whole in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor().detach(), whole.detach(), rtol=1e-7, atol=1e-9)


def collectives_do_not_depend_on_parameters():
    """An evaluation, the pair, the direction: one each. Plain parameters need none."""
    mesh, rows = meshes()["a line"]
    counts = []
    for some in (rows, {"even": rows["even"]}):
        _, sharded = both(mesh, some, {"lr": 0.05, "max_iter": 5, "tolerance_change": 0.0, "tolerance_grad": 0.0})
        params = list(sharded.params.values())
        grads = [
            torch.ones_like(p)
            if not isinstance(p, DTensor)
            else spread(torch.ones(p.shape).double(), mesh, p.placements)
            for p in params
        ]

        def closure(params=params, grads=grads):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            return 0.0

        sharded.optimizer.step(closure)
        for grad in grads:
            grad.mul_(0.5)
        with CommDebugMode() as communication:
            sharded.optimizer.step(closure)
        counts.append(communication.get_total_counts())
    # The first evaluation; five pairs and directions; what is evaluated between them. None for the state of the step before.
    assert counts == ([15, 15] if dist.get_world_size() > 1 else [0, 0])


def state_goes_on():
    """Loaded, through a file and by torch.distributed.checkpoint: with the same bits as without a stop."""
    for name in ("a line", "a square") if dist.get_world_size() == 4 else ("a line",):
        mesh, rows = meshes()[name]
        for ways in ("load", "file", "distributed"):
            _, sharded = both(mesh, rows, SEARCH)
            _, other = both(mesh, rows, SEARCH)
            for _ in range(3):
                sharded.step()
            kept = next(iter(sharded.optimizer.state.values()))
            assert isinstance(kept["d"], DTensor) and all(isinstance(row, DTensor) for row in kept["old_dirs"])
            saved = copy.deepcopy(sharded.optimizer.state_dict())
            if ways == "file":
                file = io.BytesIO()
                torch.save(saved, file)
                file.seek(0)
                saved = torch.load(file, weights_only=False)
            elif ways == "distributed":
                path = FOLDER / f"{name} of {dist.get_world_size()}"
                checkpoint.save(saved, checkpoint_id=path)
                for vector in (saved["state"][0]["d"], *saved["state"][0]["old_stps"]):
                    vector.zero_()
                checkpoint.load(saved, checkpoint_id=path)
            other.optimizer.load_state_dict(saved)
            with torch.no_grad():
                for key, p in sharded.params.items():
                    other.params[key].copy_(p)
            for _ in range(2):
                sharded.step(), other.step()
                for key, p in sharded.params.items():
                    assert torch.equal(*part_of(other.params[key].detach(), p.detach())), (name, ways, key)


def gradients_of_other_layouts_are_brought_to_the_parameters():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    single = nn.Parameter(torch.ones(6, 2, dtype=torch.float64))
    sharded = nn.Parameter(spread(torch.ones(6, 2, dtype=torch.float64), mesh, [Shard(0)]))
    slope = torch.arange(12.0, dtype=torch.float64).reshape(6, 2)

    def step(p, place):
        optimizer = optim_ext.LBFGS([p], lr=0.1, max_iter=3)

        def closure():
            here = p.full_tensor() if isinstance(p, DTensor) else p
            grad = (here * slope).detach()
            if place is not None and place.is_partial():
                grad = grad / dist.get_world_size()
            p.grad = grad if place is None else DTensor.from_local(grad, mesh, [place])
            return (0.5 * here**2 * slope).sum().item()

        for _ in range(3):
            optimizer.step(closure)

    step(single, None)
    for place in (Replicate(), Partial()):
        with torch.no_grad():
            sharded.copy_(spread(torch.ones(6, 2, dtype=torch.float64), mesh, [Shard(0)]))
        step(sharded, place)
        torch.testing.assert_close(*part_of(sharded.detach(), single.detach()), rtol=1e-9, atol=1e-9)


def a_step_may_be_skipped():
    """By the norm of all parts: one process has the infinite one."""
    mesh, rows = meshes()["a line"]
    _, sharded = both(mesh, rows, SEARCH)
    sharded.step()
    sharded.optimizer.set_grad_policy(skip_nonfinite=True)
    before = {name: p.detach().clone() for name, p in sharded.params.items()}

    def closure():
        loss = sharded.closure()
        grad = sharded.params["even"].grad
        if dist.get_rank() == dist.get_world_size() - 1:
            grad._local_tensor[0, 0] = float("inf")
        return loss

    sharded.optimizer.step(closure)
    assert sharded.optimizer.grad_policy.last_step_skipped
    for name, p in sharded.params.items():
        assert torch.equal(*part_of(p.detach(), before[name]))
    sharded.step()
    assert not sharded.optimizer.grad_policy.last_step_skipped


def recovery_is_the_same_on_all_processes():
    """From a loss that is not a number on one process only."""
    mesh, rows = meshes()["a line"]
    _, sharded = both(mesh, rows, {**SEARCH, "recover": True})
    sharded.step()
    start = sharded.calls

    def closure():
        loss = sharded.closure()
        is_bad = sharded.calls == start + 2 and dist.get_rank() == 0
        return loss * float("nan") if is_bad else loss

    before = sharded.closure().item()
    sharded.calls = start
    sharded.optimizer.step(closure)
    calls = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(calls, torch.tensor([sharded.calls]))
    assert len({int(each) for each in calls}) == 1
    assert sharded.closure().item() <= before


def averages_follow():
    mesh, rows = meshes()["a line"]
    single, sharded = both(mesh, rows, SEARCH)
    averages = []
    for side in (single, sharded):
        model = nn.ParameterDict(side.params)
        averages.append(optim_ext.swa_utils.AveragedModel(model))
        side.optimizer.average_into(averages[-1], model)
    for _ in range(3):
        single.step(), sharded.step()
    one, parts = (dict(average.module.named_parameters()) for average in averages)
    for name, whole in one.items():
        torch.testing.assert_close(*part_of(parts[name].detach(), whole.detach()), rtol=1e-9, atol=1e-9)


def an_exception_leaves_the_last_iteration():
    mesh, rows = meshes()["a line"]
    single, sharded = both(mesh, rows, SEARCH)
    for side in (single, sharded):
        side.step()
        end = side.calls + 3

        def closure(side=side, end=end):
            if side.calls == end:
                raise KeyError("enough")
            return side.closure()

        with pytest.raises(KeyError, match="enough"):
            side.optimizer.step(closure)
    assert_follows(sharded, single, 1e-8)
    single.step(), sharded.step()
    assert_follows(sharded, single, 1e-8)


def bad_input_is_refused_on_all_processes():
    world = dist.get_world_size()
    mesh, rows = meshes()["a line"]
    _, sharded = both(mesh, rows, {**SEARCH, "bounds": (0.0, 1.0)})
    with pytest.raises(RuntimeError, match="no bounds for DTensors"):
        sharded.step()
    _, sharded = both(mesh, rows, SEARCH)

    sharded.step()
    before = {name: p.detach().clone() for name, p in sharded.params.items()}
    kept = next(iter(sharded.optimizer.state.values()))
    kept["d"] = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'d' of LBFGS .* is not that of these parameters"):
        sharded.step()
    for name, p in sharded.params.items():
        assert torch.equal(*part_of(p.detach(), before[name]))
    p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with pytest.raises(RuntimeError, match="is a sum that has not been made"):
        optim_ext.LBFGS([p]).step(lambda: 0.0)
    other = init_device_mesh("cpu", (world, 1))
    params = [
        nn.Parameter(spread(torch.ones(4), mesh, [Shard(0)])),
        nn.Parameter(spread(torch.ones(4), other, [Shard(0), Replicate()])),
    ]
    (report,) = optim_ext.explain(optim_ext.LBFGS(params))
    assert not report.native and "on another mesh than the first DTensor" in report.reason


def processes_that_disagree_on_a_gradient_all_refuse_it():
    world = dist.get_world_size()
    if world == 1:
        return
    mesh, rows = meshes()["a line"]
    _, sharded = both(mesh, rows, SEARCH)

    def closure():
        loss = sharded.closure()
        grad = torch.ones(8, 3, dtype=torch.float64)
        wanted = [Replicate()] if dist.get_rank() == 0 else [Shard(0)]
        sharded.params["even"].grad = spread(grad, mesh, wanted)
        return loss

    with pytest.raises(RuntimeError, match="all processes have to join"):
        sharded.optimizer.step(closure)


CASES = [
    steps_follow_one_process, a_maximum_is_found, copies_stay_the_same_on_all_processes,
    losses_of_parts_of_the_data_are_averaged, collectives_do_not_depend_on_parameters, state_goes_on,
    gradients_of_other_layouts_are_brought_to_the_parameters, a_step_may_be_skipped,
    recovery_is_the_same_on_all_processes, averages_follow, an_exception_leaves_the_last_iteration,
    bad_input_is_refused_on_all_processes, processes_that_disagree_on_a_gradient_all_refuse_it,
]  # fmt: skip


if __name__ == "__main__":
    serve(CASES)
