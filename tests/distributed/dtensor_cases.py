"""What test_dtensors.py runs on several processes: see ranks.py. Every process knows the whole of all tensors, so that it
can compare what it has of them with one process's result."""

import copy
import functools
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, ON_CPU
from parts import part_of, spread
from ranks import serve
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from user_rules import twins

import optim_ext
from optim_ext._step.local_view import Agreement

FOLDER = Path(sys.argv[3] if __name__ == "__main__" else ".")

# Rules that are applied element by element: class, options.
ROWS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.1, "amsgrad": True}),
    ("AdamW", {"lr": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.1}),
    ("Adadelta", {}),
    ("Adamax", {"lr": 0.1}),
    ("NAdam", {"lr": 0.1, "momentum_decay": 0.01}),
    ("RAdam", {"lr": 0.1}),
    ("ASGD", {"lr": 0.1, "t0": 2}),
    ("Rprop", {"lr": 0.1}),
    ("Lion", {"lr": 0.01, "weight_decay": 0.1}),
]


@functools.cache
def layouts():
    """By name: the mesh, the placements and the shape of the whole tensor."""
    world = dist.get_world_size()
    line = init_device_mesh(DEVICE.type, (world,))
    rows = {
        "even": (line, [Shard(0)], (8, 3)),
        "uneven": (line, [Shard(0)], (5, 3)),
        "empty": (line, [Shard(0)], (1, 7)),
        "columns": (line, [Shard(1)], (3, 10)),
        "vector": (line, [Shard(0)], (301,)),
        "copies": (line, [Replicate()], (4, 3)),
    }
    if world == 4:
        square = init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("a", "b"))
        rows |= {
            "hybrid": (square, [Replicate(), Shard(0)], (6, 3)),
            "uneven hybrid": (square, [Replicate(), Shard(0)], (5, 3)),
            "rows and columns": (square, [Shard(0), Shard(1)], (6, 5)),
            "rows then copies": (square, [Shard(0), Replicate()], (7, 2)),
            "cut twice": (square, [_StridedShard(0, split_factor=2), Shard(0)], (8, 3)),
            "on half of the mesh": (square["b"], [Shard(0)], (9, 2)),
        }
    return rows


def made(dtype=torch.float32, seed=0):
    """Whole tensors and DTensor parameters of all layouts, and with these some plain ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = layouts()
    wholes = {name: torch.randn(shape, generator=generator).to(dtype) for name, (_, _, shape) in rows.items()}
    params = {name: nn.Parameter(spread(wholes[name], mesh, places)) for name, (mesh, places, _) in rows.items()}
    for name, shape in (("plain", (4, 5)), ("number", ())):
        wholes[name] = torch.randn(shape, generator=generator).to(dtype)
        params[name] = nn.Parameter(wholes[name].clone())
    return {name: nn.Parameter(whole.clone()) for name, whole in wholes.items()}, params


def give_grads(wholes, params, index, names=None):
    """Both the same, part by part."""
    generator = torch.Generator().manual_seed(100 + index)
    rows = layouts()
    for name, whole in wholes.items():
        grad = torch.randn(whole.shape, generator=generator).to(whole.dtype)
        if names is not None and name not in names:
            whole.grad = params[name].grad = None
            continue
        whole.grad = grad
        params[name].grad = spread(grad.clone(), *rows[name][:2]) if name in rows else grad.clone()


def local(tensor):
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(params, wholes, what="value", rtol=0, atol=0):
    for name, whole in wholes.items():
        mine, theirs = part_of(params[name].detach(), whole.detach())
        torch.testing.assert_close(
            mine, theirs, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{what} of {n}: {text}"
        )


def assert_same_state(optimizer, params, single, wholes):
    for name, whole in wholes.items():
        ours, theirs = optimizer.state[params[name]], single.state[whole]
        assert list(ours) == list(theirs), name
        for key, value in theirs.items():
            mine = ours[key]
            if isinstance(mine, DTensor):
                spec, wanted = mine._spec, params[name]._spec
                assert (spec.mesh, spec.placements, spec.tensor_meta.shape, spec.tensor_meta.stride) == (
                    wanted.mesh,
                    wanted.placements,
                    wanted.tensor_meta.shape,
                    wanted.tensor_meta.stride,
                )
            elif isinstance(mine, torch.Tensor):
                assert mine.dim() == 0 or not isinstance(params[name], DTensor), (name, key)
            mine, theirs = part_of(mine, value)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")


def assert_native(optimizer):
    reports = optim_ext.explain(optimizer)
    assert all(report.native for report in reports), [str(report) for report in reports]


def pair(name, options, dtype=torch.float32, seed=0):
    """One process's optimizer of whole tensors, and the optimizer of DTensors."""
    wholes, params = made(dtype, seed)
    cls = getattr(optim_ext, name)
    single, optimizer = (cls(list(of.items()), **options) for of in (wholes, params))
    return wholes, params, single, optimizer


def steps_have_the_bits_of_one_process():
    for dtype in (torch.float32, torch.bfloat16):
        for name, options in ROWS if dtype == torch.float32 else ROWS[3:4]:
            wholes, params, single, optimizer = pair(name, options, dtype)
            for index in range(5):
                give_grads(wholes, params, index)
                for each in (single, optimizer):
                    for group in each.param_groups:
                        group["lr"] = options.get("lr", 0.01) / (1 + index)
                    each.step()
                assert_same(params, wholes, f"{name} {options} {index}")
            assert_same_state(optimizer, params, single, wholes)
            assert_native(optimizer)


def a_step_is_no_collective():
    """The first one asks whether the processes have gradients of one kind, the others nothing."""
    wholes, params, _, optimizer = pair("AdamW", {})
    for index in range(4):
        give_grads(wholes, params, index)
        with CommDebugMode() as communication:
            optimizer.step()
        groups = {1: 0, 2: 1, 4: 3}[dist.get_world_size()]
        assert communication.get_total_counts() == (groups if index == 0 else 0)


def small_steps_are_repeated():
    """The fast way of a plan, of which small DTensors are not to be deprived."""
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)])) for _ in range(5)]
    optimizer = optim_ext.AdamW(params)
    for _ in range(6):
        for p in params:
            p.grad = distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)])
        optimizer.step()
    repeated = optimizer._view.plan.steps_as_before
    assert repeated >= 3 if ON_CPU else repeated == 0  # elsewhere each step looks at what its tensors are


def steps_of_some_parameters_have_the_bits_of_one_process():
    """Gradients come and go, alike on all processes, and all at once are gone."""
    for name, options in (("AdamW", {"lr": 0.1}), ("SGD", {"lr": 0.1, "momentum": 0.9})):
        wholes, params, single, optimizer = pair(name, options)
        for index, names in enumerate((["even", "plain"], None, ["uneven"], [], ["copies", "empty"], None, None)):
            give_grads(wholes, params, index, names)
            single.step()
            optimizer.step()
            assert_same(params, wholes)
        assert_same_state(optimizer, params, single, wholes)


def several_groups_have_options_of_their_own():
    wholes, params = made()
    names = list(wholes)

    def groups(of):
        return [
            {"params": [(n, of[n]) for n in names[::2]], "weight_decay": 0.1},
            {"params": [(n, of[n]) for n in names[1::2]], "lr": 0.03},
        ]

    single, optimizer = (optim_ext.AdamW(groups(of), lr=0.1) for of in (wholes, params))
    for index in range(6):
        give_grads(wholes, params, index)
        if index == 4:
            for each in (single, optimizer):
                each.param_groups[0]["betas"] = (0.8, 0.99)
                each.param_groups[1]["maximize"] = True
        single.step()
        optimizer.step()
        assert_same(params, wholes)
    assert_same_state(optimizer, params, single, wholes)


def a_group_that_is_left_to_torch_steps_beside_the_others():
    """Its DTensors and their state are the optimizer's own all the while."""
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    wholes = [nn.Parameter(torch.randn(6, 2, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    params = [nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)])) for whole in wholes]
    single, optimizer = (
        optim_ext.AdamW([{"params": [a]}, {"params": [b], "differentiable": True}], lr=0.1) for a, b in (wholes, params)
    )
    assert [report.native for report in optim_ext.explain(optimizer)] == [True, False]
    for index in range(4):
        for whole, p in zip(wholes, params, strict=True):
            whole.grad = torch.full((6, 2), 1.0 + index)
            p.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
        single.step()
        optimizer.step()
        for whole, p in zip(wholes, params, strict=True):
            torch.testing.assert_close(full(p.detach()), whole.detach(), rtol=1e-6, atol=1e-6)
    assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in params)
    assert len(optimizer.state) == 2


def nothing_brought_to_another_layout_is_kept():
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.zeros(6), mesh, [Replicate()]))
    optimizer = optim_ext.SGD([p], lr=0.1)
    for _ in range(2):
        p.grad = DTensor.from_local(torch.ones(6), mesh, [Partial()])
        optimizer.clip_grad_norm(1.0)
        kept = [weakref.ref(lent.part) for lent in optimizer._view.lent.values()]
        assert len(kept) == 1
        optimizer.step()
        p.grad = None  # of one process it is the part itself
        gc.collect()
        assert [each() for each in kept] == [None]


def local_tensors_may_be_replaced():
    """As FSDP does when a module is moved, loaded or made from meta."""
    wholes, params, single, optimizer = pair("AdamW", {"lr": 0.1})
    for index in range(6):
        give_grads(wholes, params, index)
        if index in (2, 4):
            for p in params.values():
                if isinstance(p, DTensor):
                    p._local_tensor = p._local_tensor.detach().clone()
        if index == 3:
            for p in params.values():
                for key, value in optimizer.state[p].items():
                    if isinstance(value, DTensor):
                        optimizer.state[p][key] = value.clone()
        single.step()
        optimizer.step()
        assert_same(params, wholes)
    assert_same_state(optimizer, params, single, wholes)


def nothing_is_kept_alive_between_steps():
    wholes, params = made()
    del params["plain"], params["number"], wholes["plain"], wholes["number"]
    optimizer = optim_ext.AdamW(params.values())
    for index in range(4):
        give_grads(wholes, params, index)
        optimizer.step()
    storages = [p._local_tensor.untyped_storage() for p in params.values()]
    storages += [p.grad._local_tensor.untyped_storage() for p in params.values()]
    storages += [
        value._local_tensor.untyped_storage()
        for p in params.values()
        for key, value in optimizer.state[p].items()
        if key != "step"
    ]
    freed = [storage._weak_ref() for storage in storages]
    wholes_gone = [weakref.ref(p) for p in params.values()]
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"].clear()
    params.clear()
    wholes.clear()
    del storages, group
    gc.collect()
    assert [each() for each in wholes_gone] == [None] * len(wholes_gone)
    assert all(torch.UntypedStorage._expired(each) for each in freed)
    optimizer.step()


def gradients_of_other_layouts_are_brought_to_the_parameters():
    """Once, by one all_reduce for the sums of a group and dtype; a gradient that is all there is cut without any."""
    world = dist.get_world_size()
    mesh = init_device_mesh(DEVICE.type, (world,))
    generator = torch.Generator().manual_seed(3)
    rows = [
        ("norm", [Replicate()], [Partial()], (6,)),
        ("other norm", [Replicate()], [Partial()], (4, 2)),
        ("embedding", [Shard(0)], [Replicate()], (7, 3)),
        ("linear", [Shard(0)], [Partial()], (5, 2)),
        ("usual", [Shard(0)], [Shard(0)], (6, 2)),
        ("turned", [Shard(0)], [Shard(1)], (4, 4)),
    ]
    wholes, params = {}, {}
    for name, places, _, shape in rows:
        wholes[name] = nn.Parameter(torch.randn(shape, generator=generator))
        params[name] = nn.Parameter(distribute_tensor(wholes[name].detach(), mesh, places))
    single, optimizer = (optim_ext.AdamW(list(of.items()), lr=0.1) for of in (wholes, params))
    for _ in range(4):
        for name, _, places, shape in rows:
            # Sums of small whole numbers, which are exact in any order.
            parts = torch.randint(-8, 8, (world, *shape), generator=generator).float()
            wholes[name].grad = parts.sum(0)
            if places == [Partial()]:
                grad = DTensor.from_local(parts[dist.get_rank()], mesh, places)
            else:
                grad = distribute_tensor(wholes[name].grad, mesh, places)
            params[name].grad = grad
        before = {name: p.grad for name, p in params.items()}
        single.step()
        with CommDebugMode() as communication:
            optimizer.step()
        assert_same(params, wholes)
        assert all(p.grad is before[name] for name, p in params.items())
        counts = {op.__name__.split(".")[0]: n for op, n in communication.get_comm_counts().items()}
        # The agreement and the sums; what turns a gradient from one cut to the other is for gloo an all_gather.
        assert counts == ({} if world == 1 else {
            "allreduce_": 2, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 1
        }), counts  # fmt: skip
    assert_same_state(optimizer, params, single, wholes)


def meshes_that_are_equal_are_one():
    """A gradient's mesh may be another object, with process groups of its own."""
    whole = nn.Parameter(torch.ones(5, 2))
    world = dist.get_world_size()
    p = nn.Parameter(distribute_tensor(whole.detach(), init_device_mesh(DEVICE.type, (world,)), [Shard(0)]))
    single, optimizer = optim_ext.AdamW([whole]), optim_ext.AdamW([p])
    for index in range(3):
        whole.grad = torch.full((5, 2), float(index))
        p.grad = distribute_tensor(whole.grad, init_device_mesh(DEVICE.type, (world,)), [Shard(0)])
        single.step()
        with CommDebugMode() as communication:
            optimizer.step()
        assert communication.get_total_counts() == (1 if world > 1 and index == 0 else 0)
        assert_same({"p": p}, {"p": whole})


def a_gradient_that_is_being_communicated_is_waited_for():
    import torch.distributed._functional_collectives as collectives

    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    whole = nn.Parameter(torch.ones(4, 2))
    p = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Replicate()]))
    single, optimizer = optim_ext.SGD([whole], lr=0.1), optim_ext.SGD([p], lr=0.1)
    for _ in range(3):
        part = collectives.all_reduce(torch.ones(4, 2), "sum", mesh)
        p.grad = DTensor(part, p._spec, requires_grad=False)
        whole.grad = torch.full((4, 2), float(dist.get_world_size()))
        optimizer.step()
        single.step()
        assert_same({"p": p}, {"p": whole})


def refused(match, optimizer, params, wholes, agreements=0):
    """Raised on every process, and nothing was written, nor communicated but what they find out about each other."""
    before = {key: dict(entry) for key, entry in optimizer.state.items()}
    with CommDebugMode() as communication, pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert communication.get_total_counts() == (0 if dist.get_world_size() == 1 else agreements)
    assert {key: dict(entry) for key, entry in optimizer.state.items()} == before
    assert_same(params, wholes)


def bad_input_is_refused_on_all_processes_alike():
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    wholes, params, single, optimizer = pair("AdamW", {"lr": 0.1})
    give_grads(wholes, params, 0)
    bad = distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)])
    params["uneven"].grad = bad
    bad._local_tensor = torch.ones(11, 3)
    with pytest.raises(RuntimeError, match="parameter 'uneven'"):
        optimizer.step()
    assert not optimizer.state
    give_grads(wholes, params, 0)
    single.step()
    optimizer.step()
    give_grads(wholes, params, 1)

    moments = optimizer.state[params["columns"]]
    kept = moments["exp_avg"]
    moments["exp_avg"] = distribute_tensor(kept.full_tensor(), mesh, [Replicate()])
    refused(
        "parameter 'columns': its state 'exp_avg' has placements.*set_optimizer_state_dict", optimizer, params, wholes
    )
    moments["exp_avg"] = kept.full_tensor()
    refused("parameter 'columns': its state 'exp_avg' is a tensor.*set_optimizer_state_dict", optimizer, params, wholes)
    moments["exp_avg"] = kept
    single.step()
    optimizer.step()
    assert_same(params, wholes)


def a_plain_gradient_of_a_dtensor_is_refused():
    """Torch's own setter refuses it; what gets past that is refused by name."""
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    whole = nn.Parameter(torch.ones(4, 2))
    p = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Replicate()]))
    optimizer = optim_ext.SGD([("weight", p)], lr=0.1)
    try:
        p.grad = torch.ones(4, 2)
    except RuntimeError:
        return
    match = "gradient of parameter 'weight': it is a Tensor, and the parameter a DTensor"
    refused(match, optimizer, {"p": p}, {"p": whole}, agreements=1)


def a_partial_parameter_is_refused():
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    p = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    optimizer = optim_ext.AdamW([("weight", p)])
    with (
        CommDebugMode() as communication,
        pytest.raises(RuntimeError, match="parameter 'weight' is a sum that has not"),
    ):
        optimizer.step()
    assert communication.get_total_counts() == 0 and not optimizer.state


class Quantised(torch.Tensor):
    """A stand-in for a tensor that has operations of its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)


def local_tensors_with_operations_of_their_own_are_left_to_torch():
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    p._local_tensor = Quantised(torch.ones(4))
    optimizer = optim_ext.AdamW([("weight", p)])
    (report,) = optim_ext.explain(optimizer)
    assert not report.native and "parameter 'weight': its local tensor is a Quantised" in report.reason


WHOLE_ROWS = [
    ("Muon", {"lr": 0.1, "weight_decay": 0.01}),
    ("Adafactor", {"lr": 0.1}),
    ("LAMB", {"lr": 0.1, "weight_decay": 0.1}),
    ("LARS", {"lr": 0.1, "momentum": 0.9}),
    *([("LAMB as a rule", {"lr": 0.1, "weight_decay": 0.1}), ("LARS as a rule", {"lr": 0.1})] if ON_CPU else []),
]


def class_named(name):
    """One of ours, or what was written again in Python."""
    own, _, is_rule = name.partition(" as ")
    return getattr(twins if is_rule else optim_ext, own)


def rules_about_whole_tensors_have_the_bits_of_one_process():
    """By owners, or gathered where several dimensions of a mesh cut; state is kept in parts. Where norms of the whole are
    enough, these are added up in another order, so that their last bit may be another."""
    for name, options in WHOLE_ROWS:
        by_norms = name.startswith("LA")
        close = dict(rtol=1e-6, atol=1e-6) if by_norms else dict(rtol=0, atol=0)
        wholes, params = made()
        names = [n for n, whole in wholes.items() if whole.dim() == 2 or name != "Muon"]
        wholes, params = ({n: of[n] for n in names} for of in (wholes, params))
        single, optimizer = (class_named(name)(list(of.items()), **options) for of in (wholes, params))
        found = []
        for of, each in ((wholes, single), (params, optimizer)):
            model = Holder(list(of.values()))
            averaged = optim_ext.swa_utils.AveragedModel(model)
            each.average_into(averaged, model)
            found.append((averaged, model))
        for index in range(5):
            given = None if index != 2 else ["even", "columns"]
            give_grads(wholes, params, index, given)
            single.step()
            with CommDebugMode() as communication:
                optimizer.step()
            if dist.get_world_size() == 2:  # one, or there and back; and the agreement of the first step
                expected = (1 if by_norms else 2) + (index == 0)
                assert communication.get_total_counts() == expected, communication.get_comm_counts()
            assert_same(params, wholes, f"{name} {index}", **close)
            expected, mine = (dict(zip(names, averaged.parameters(), strict=True)) for averaged, _ in found)
            assert_same(mine, expected, f"average of {name} {index}", **close)
        assert_native(optimizer)
        for n, whole in wholes.items():
            ours, theirs = optimizer.state[params[n]], single.state[whole]
            assert list(ours) == list(theirs)
            for key, value in theirs.items():
                torch.testing.assert_close(full(ours[key]), value, **close)
                if isinstance(params[n], DTensor) and value.dim() > 0 and value.shape == whole.shape:
                    assert ours[key].placements == params[n].placements


def rules_about_whole_tensors_clip_and_skip():
    for name, options in WHOLE_ROWS:
        wholes, params = made()
        names = [n for n, whole in wholes.items() if whole.dim() == 2]
        wholes, params = ({n: of[n] for n in names} for of in (wholes, params))
        single, optimizer = (class_named(name)(list(of.items()), **options) for of in (wholes, params))
        for each in (single, optimizer):
            each.set_grad_policy(skip_nonfinite=True)
        for index in range(4):
            give_grads(wholes, params, index)
            if index == 1:
                wholes["even"].grad[0, 0] = float("nan")
                if dist.get_rank() == 0:
                    params["even"].grad.to_local()[0, 0] = float("nan")
            for each in (single, optimizer):
                if index == 3:
                    each.clip_grad_norm(0.5)
                each.step()
            for n, whole in wholes.items():
                torch.testing.assert_close(full(params[n].detach()), whole.detach(), rtol=1e-4, atol=1e-5)


def rules_take_norms_of_all_parts():
    """Of parameters, gradients, states and what is computed, also as means and into a number of the state; where gradients
    are scaled and clipped; with no gradients on some steps."""
    from user_rules.test_norms import MADE

    classes = (optim_ext.LAMB, optim_ext.LARS, *(MADE if ON_CPU else ()))
    for cls in classes:
        wholes, params = made()
        single, optimizer = (cls(list(of.items()), lr=0.1) for of in (wholes, params))
        for each in (single, optimizer):
            each.set_grad_policy(max_norm=1.0)
        for index in range(4):
            give_grads(wholes, params, index, ["columns", "plain"] if index == 2 else None)
            for each in (single, optimizer):
                each._step_supports_amp_scaling = True
                each.grad_scale = torch.tensor(3.0, device=DEVICE) if index == 1 else None
                each.found_inf = torch.tensor(float(index == 3), device=DEVICE)
                each.step()
                del each.grad_scale, each.found_inf
            assert_same(params, wholes, f"{cls.__name__} {index}", rtol=2e-5, atol=2e-6)
            for n, p in params.items():
                if p.grad is not None:  # they are unscaled once
                    torch.testing.assert_close(full(p.grad), wholes[n].grad, rtol=0, atol=0)
        assert_native(optimizer)
        for n, whole in wholes.items():
            for key, value in single.state[whole].items():
                torch.testing.assert_close(full(optimizer.state[params[n]][key]), value, rtol=2e-5, atol=2e-6)


def options_decide_whether_norms_are_taken():
    """Of a rule that takes them by one of its options."""
    if not ON_CPU:
        return

    @optim_ext.rule(backend="interpreted")
    def Normed(param, grad, *, lr=0.1, by_norm=False):
        return param - (lr / optim_ext.math.norm(grad) * grad if by_norm else lr * grad)

    wholes, params = made()
    single, optimizer = (Normed(list(of.items())) for of in (wholes, params))
    for index in range(6):
        give_grads(wholes, params, index)
        for each in (single, optimizer):
            each.param_groups[0]["by_norm"] = index // 2 == 1
            each.step()
        assert_same(params, wholes, f"{index}", rtol=1e-6, atol=1e-6)


def a_step_that_one_process_refuses_is_taken_by_none():
    """Where all of them wait for norms of the whole: nothing is written, no gradient unscaled and no step counted. (A GPU is
    not waited for, nor can the host see a count there.)"""
    if not ON_CPU:
        return
    for way in ({}, {"state_precision": "bf16"}):
        wholes, params = made()
        if way and "cut twice" in params:  # of which chance does not know where it is
            del wholes["cut twice"], params["cut twice"]
        optimizer = optim_ext.LAMB(list(params.items()), lr=0.1, **way)
        optimizer._step_supports_amp_scaling = True
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        for index in range(3):  # the first one is planned, the others go by its plan
            give_grads(wholes, params, index)
            optimizer.step()
        mine = dist.get_rank() == dist.get_world_size() - 1
        for what in ("a count", "a state"):
            entry = optimizer.state[params["vector"]]
            kept = dict(entry)
            if mine and what == "a count":
                entry["step"] = torch.tensor(-3.0)
            elif mine:
                del entry["exp_avg"]
            give_grads(wholes, params, 1)
            before = copy.deepcopy([list(params.values()), [p.grad for p in params.values()], dict(optimizer.state)])
            told = "parameter 'vector'|exp_avg" if mine else "another process of a group refuses"
            with pytest.raises((RuntimeError, KeyError), match=told):  # as torch raises where state is missing
                optimizer.step()
            for p, old, grad, old_grad, (_, old_entry) in zip(
                params.values(), before[0], (p.grad for p in params.values()), before[1], before[2].items(), strict=True
            ):
                assert torch.equal(local(p), local(old)) and torch.equal(local(grad), local(old_grad))
                for key, value in old_entry.items():
                    assert torch.equal(local(optimizer.state[p][key]), local(value)), key
            optimizer.state[params["vector"]] = kept
        optimizer.step()


def a_parameter_that_is_there_twice_has_no_norm_of_the_whole():
    if dist.get_world_size() == 1:
        return
    _, params = made()
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = optim_ext.LAMB([params["even"], params["even"]])
    params["even"].grad = params["even"].detach().clone()
    with pytest.raises(RuntimeError, match="parameter 0 of group 0: it is in the optimizer twice"):
        optimizer.step()


def what_an_owner_refuses_no_process_waits_for():
    """Bad input that one process alone has: it raises its error, and the others say that there is one."""
    wholes, params = made()
    params = {n: params[n] for n in ("even", "uneven", "empty", "columns", "vector")}  # each has an owner
    optimizer = optim_ext.Adafactor(list(params.items()), lr=0.1)
    for index in range(2):
        give_grads({n: wholes[n] for n in params}, params, index)
        optimizer.step()
    before = {n: full(p.detach()).clone() for n, p in params.items()}
    if dist.get_rank() == 0:
        optimizer.state[params["even"]]["step"].fill_(-3.0)
    names = [n for n, p in params.items() if optimizer.state[p]["step"].item() < 0]
    assert len(names) == (dist.get_rank() == 0)
    give_grads({n: wholes[n] for n in params}, params, 3)
    # The owner of the first parameter is the first process.
    with pytest.raises(RuntimeError, match="parameter 'even': step|refuses this step"):
        optimizer.step()
    for n, p in params.items():
        torch.testing.assert_close(full(p.detach()), before[n], rtol=0, atol=0)


def a_gradient_that_one_process_has_wrong_is_refused_by_all():
    """Not in a collective that the others have begun: an owner may be waiting for it."""
    wholes, params = made()
    params = {n: params[n] for n in ("even", "uneven", "empty", "columns", "vector")}  # each has an owner
    optimizer = optim_ext.Adafactor(list(params.items()), lr=0.1)
    for index, wrong in enumerate((torch.Tensor.double, lambda grad: grad[:-1])):
        give_grads({n: wholes[n] for n in params}, params, index)
        optimizer.step()
        before = {n: full(p.detach()).clone() for n, p in params.items()}
        give_grads({n: wholes[n] for n in params}, params, 3)
        is_wrong = dist.get_world_size() > 1 and dist.get_rank() == dist.get_world_size() - 1
        if is_wrong:
            grad = params["vector"].grad
            grad._local_tensor = wrong(grad._local_tensor)
        message = "gradient of parameter 'vector': .*whole tensors that are cut" if is_wrong else "refuses this step"
        if dist.get_world_size() > 1:
            with pytest.raises(RuntimeError, match=message):
                optimizer.step()
        for n, p in params.items():
            torch.testing.assert_close(full(p.detach()), before[n], rtol=0, atol=0)


def rules_about_whole_tensors_step_copies_natively():
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    for name, _ in WHOLE_ROWS:
        for places in ([Replicate()], [Shard(0)]):
            whole = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
            p = nn.Parameter(distribute_tensor(whole.detach(), mesh, places))
            single, optimizer = (class_named(name)([q], lr=0.1) for q in (whole, p))
            (report,) = optim_ext.explain(optimizer)
            assert report.native, report
            for _ in range(3):
                whole.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
                p.grad = distribute_tensor(whole.grad, mesh, places)
                single.step()
                optimizer.step()
                assert_same({"p": p}, {"p": whole})


def explain_says_what_is_sharded():
    _, _, _, optimizer = pair("AdamW", {})
    (report,) = optim_ext.explain(optimizer)
    world, count = dist.get_world_size(), len(layouts())
    assert report.native and f"{count} of {count + 2} parameters" in report.reason, report
    assert ("sharded over" in report.reason) == (world > 1), report


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 23), nn.GELU(), nn.LayerNorm(23), nn.Linear(23, 3))


def fsdp(package=optim_ext, name="AdamW", options=None, **how):
    model = network()
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)
    return model, getattr(package, name)(model.parameters(), **(options or {"lr": 0.01}))


def backward(model, index, rank=0):
    """The same batch everywhere, so that the mean over processes is that of one process up to the last bits."""
    torch.manual_seed(100 * index + rank)
    nn.functional.cross_entropy(model(torch.randn(8, 10)), torch.randint(0, 3, (8,))).backward()


def a_model_that_fsdp_has_cut_trains_as_with_torchs_class():
    for name, options in (("AdamW", {"lr": 0.01}), ("SGD", {"lr": 0.1, "momentum": 0.9})):
        results = []
        for package in (torch.optim, optim_ext):
            model, optimizer = fsdp(package, name, options)
            for index in range(5):
                backward(model, index)
                optimizer.step()
                optimizer.zero_grad()
            results.append([full(p.detach()) for p in model.parameters()])
        torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)
        assert_native(optimizer)


def checkpoints_go_into_and_out_of_torchs_class():
    """Sharded and whole, through get_ and set_optimizer_state_dict and by torch.distributed.checkpoint."""
    rows = [("AdamW", {"lr": 0.01}), ("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adagrad", {})]
    alone = [("Adafactor", {"lr": 0.01}), ("LAMB", {"lr": 0.01})]  # torch's Adafactor takes no parts
    for name, options in rows + alone:
        ours, theirs = optim_ext, torch.optim
        for first, second in [(ours, ours)] + ([(theirs, ours), (ours, theirs)] if (name, options) in rows else []):
            for whole in (False, True):
                how = StateDictOptions(full_state_dict=whole)
                model, optimizer = fsdp(first, name, options)
                for index in range(3):
                    backward(model, index)
                    optimizer.step()
                    optimizer.zero_grad()
                weights, state = get_state_dict(model, optimizer, options=how)
                other, resumed = fsdp(second, name, options)
                # Tensors of their own, as a file would have.
                weights, state, given = copy.deepcopy(
                    (weights, state, get_optimizer_state_dict(model, optimizer, options=how))
                )
                set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=how)
                set_optimizer_state_dict(other, resumed, given, options=how)
                for mine, expected in zip(resumed.state.values(), optimizer.state.values(), strict=True):
                    for key in expected:
                        torch.testing.assert_close(*part_of(mine[key], expected[key]), rtol=0, atol=0)
                for index in range(3, 6):
                    for each, by in ((model, optimizer), (other, resumed)):
                        backward(each, index)
                        by.step()
                        by.zero_grad()
                for p, q in zip(other.parameters(), model.parameters(), strict=True):
                    exactly = {"rtol": 0, "atol": 0} if first is second else {"rtol": 2e-5, "atol": 2e-5}
                    torch.testing.assert_close(*part_of(p.detach(), q.detach()), **exactly)


def then_saves():
    model, optimizer = fsdp()
    for index in range(3):
        backward(model, index)
        optimizer.step()
        optimizer.zero_grad()
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=FOLDER / "checkpoint")
    # Gradients depend on the number of processes in their last bits, so those to come are given.
    for index in range(3):
        give(model, index)
        optimizer.step()
    torch.save([full(p.detach()) for p in model.parameters()], FOLDER / f"expected {dist.get_rank()}")


def give(model, index):
    generator = torch.Generator().manual_seed(index)
    for p in model.parameters():
        p.grad = distribute_tensor(torch.randn(p.shape, generator=generator), p.device_mesh, p.placements)


def then_resumes():
    model, optimizer = fsdp()
    weights, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=FOLDER / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for index in range(3):
        give(model, index)
        optimizer.step()
    for p, expected in zip(model.parameters(), torch.load(FOLDER / "expected 0"), strict=True):
        torch.testing.assert_close(full(p.detach()), expected, rtol=0, atol=0)


def objects_do_not_accumulate():
    wholes, params, _, optimizer = pair("AdamW", {})
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))

    def step(index):
        give_grads(wholes, params, index)
        params["copies"].grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
        optimizer.step()

    for index in range(10):
        step(index)
    gc.collect()
    before = len(gc.get_objects())
    for index in range(100):
        step(index % 10)
    gc.collect()
    assert len(gc.get_objects()) - before < 50


def groups_of_layouts():
    """How many process groups cut parameters: at most as many collectives are a norm."""
    return {1: 0, 2: 1, 4: 3}[dist.get_world_size()]


def assert_alike(tensor):
    """The same bits on all processes."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    assert all(torch.equal(each, tensor) or bool(each.isnan() & tensor.isnan()) for each in found), found


def norms_are_of_all_parts():
    for norm_type in (2.0, 1.0, float("inf")):
        wholes, params, single, optimizer = pair("AdamW", {"lr": 0.1})
        for index in range(4):
            give_grads(wholes, params, index)
            expected = single.clip_grad_norm(0.5, norm_type)
            if index == 0:
                optimizer._agreement = Agreement(is_first=False)
            with CommDebugMode() as communication:
                norm = optimizer.clip_grad_norm(0.5, norm_type)
            assert communication.get_total_counts() == groups_of_layouts()
            assert type(norm) is torch.Tensor and norm.dtype == torch.float32 and norm.shape == ()
            assert_alike(norm)
            torch.testing.assert_close(norm, expected, rtol=2e-7, atol=0)
            single.step()
            with CommDebugMode() as communication:
                optimizer.step()
            assert communication.get_total_counts() == 0
            for name, whole in wholes.items():
                torch.testing.assert_close(full(params[name].detach()), whole.detach(), rtol=1e-5, atol=1e-6)


def a_policy_decides_alike_on_all_processes():
    wholes, params, single, optimizer = pair("AdamW", {"lr": 0.1})
    policies = [each.set_grad_policy(max_norm=0.5, skip_nonfinite=True, skip_above=1e4) for each in (single, optimizer)]
    for index in range(6):
        give_grads(wholes, params, index)
        if index in (2, 4):  # in the part of one process only
            value = float("nan") if index == 2 else 1e9
            wholes["vector"].grad[0] = value
            if dist.get_rank() == 0:
                params["vector"].grad.to_local()[0] = value
        before = [p.detach().clone() for p in params.values()]
        single.step()
        with CommDebugMode() as communication:
            optimizer.step()
        assert communication.get_total_counts() == groups_of_layouts() * (2 if index == 0 else 1)
        assert_alike(policies[1].last_norm)
        assert bool(policies[1].last_step_skipped) == bool(policies[0].last_step_skipped) == (index in (2, 4))
        if index in (2, 4):
            assert all(torch.equal(full(p.detach()), full(b)) for p, b in zip(params.values(), before, strict=True))
        for name, whole in wholes.items():
            torch.testing.assert_close(full(params[name].detach()), whole.detach(), rtol=1e-5, atol=1e-6)
    assert policies[1].skipped_steps == 2


def stages_are_put_together_by_a_group():
    """Processes that have parameters of their own make one norm."""
    rank, world = dist.get_rank(), dist.get_world_size()
    wholes, params, single, optimizer = pair("AdamW", {})
    give_grads(wholes, params, 0)
    alone = nn.Parameter(torch.zeros(3))
    alone.grad = torch.full((3,), 1.0 + rank)
    stage = optim_ext.AdamW([alone])
    norm = stage.clip_grad_norm(1.0, process_group=dist.group.WORLD)
    assert_alike(norm)
    torch.testing.assert_close(norm, torch.tensor(sum(3.0 * (1.0 + r) ** 2 for r in range(world))).sqrt())
    stage.step()
    # Every process has the same here, and counts as a stage.
    norm = optimizer.clip_grad_norm(1.0, process_group=dist.group.WORLD)
    torch.testing.assert_close(norm, single.clip_grad_norm(1.0) * world**0.5)


def a_process_without_gradients_joins():
    """What it does not have counts as zeros, and nobody waits for it."""
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.zeros(8), mesh, [Shard(0)]))
    optimizer = optim_ext.SGD([("weight", p)], lr=1.0)
    optimizer.set_grad_policy(skip_above=100.0)
    for _ in range(3):
        p.grad = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
        if dist.get_rank() == dist.get_world_size() - 1:
            p.grad = None
        optimizer.step()
        parts = dist.get_world_size()
        torch.testing.assert_close(optimizer.grad_policy.last_norm, torch.tensor(8.0 * (parts - 1) / parts).sqrt())


def processes_that_disagree_on_a_gradient_all_refuse_it():
    """One that has to be brought to another layout, which some processes do not have."""
    world = dist.get_world_size()
    mesh = init_device_mesh(DEVICE.type, (world,))
    p = nn.Parameter(distribute_tensor(torch.zeros(8), mesh, [Replicate()]))
    optimizer = optim_ext.SGD([("weight", p)], lr=1.0)
    for give in ("none", "alike"):
        p.grad = DTensor.from_local(torch.ones(8), mesh, [Partial()])
        if dist.get_rank() == world - 1:
            alike = DTensor.from_local(torch.ones(8), mesh, [Replicate()], run_check=False)
            p.grad = None if give == "none" else alike
        optimizer = optim_ext.SGD([("weight", p)], lr=1.0)
        if world == 1:
            optimizer.step()
            continue
        with pytest.raises(RuntimeError, match="gradient of parameter 'weight': it has to be brought to the layout"):
            optimizer.step()
        assert full(p.detach()).count_nonzero() == 0
        p.grad = DTensor.from_local(torch.ones(8), mesh, [Partial()])
        optimizer.step()
        torch.testing.assert_close(full(p.detach()), torch.full((8,), -float(world)))
        with torch.no_grad():
            p._local_tensor.zero_()
    if world == 1:
        return
    p.grad = None
    if dist.get_rank() == 0:
        p._local_tensor.grad = None
        p.grad = DTensor.from_local(torch.ones(8), mesh, [Replicate()], run_check=False)
        p.grad._local_tensor = Quantised(torch.ones(8))
    optimizer = optim_ext.SGD([("weight", p)], lr=1.0)
    with pytest.raises(RuntimeError, match="gradient of parameter 'weight': (its local|another process)"):
        optimizer.step()


def gradients_of_other_layouts_are_brought_once():
    """For the norm and the step together, and again where they were written in between."""
    world = dist.get_world_size()
    mesh = init_device_mesh(DEVICE.type, (world,))
    whole = nn.Parameter(torch.zeros(6))
    p = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Replicate()]))
    single, optimizer = optim_ext.SGD([whole], lr=1.0), optim_ext.SGD([p], lr=1.0)
    for index in range(4):
        p.grad = DTensor.from_local(torch.full((6,), 2.0), mesh, [Partial()])
        whole.grad = torch.full((6,), 2.0 * world)
        single.clip_grad_norm(1.0)
        norm = optimizer.clip_grad_norm(1.0)
        torch.testing.assert_close(norm, whole.grad.norm())
        if index == 2:
            p.grad.mul_(3.0)
            whole.grad.mul_(3.0)
        single.step()
        with CommDebugMode() as communication:
            optimizer.step()
        sums = 1 if index == 2 else 0
        assert communication.get_total_counts() == (0 if world == 1 else 1 + sums), (
            index,
            communication.get_comm_counts(),
            p.grad,
        )
        torch.testing.assert_close(full(p.detach()), whole.detach())


def gradscalers_decision_is_that_of_all_processes():
    """Also where the first gradient is a copy, whose processes torch asks alone."""
    for scaled in (False, True):
        wholes, params, single, optimizer = pair("AdamW", {"lr": 0.1, "fused": True})
        for index in range(4):
            give_grads(wholes, params, index)
            finds = index == 2
            for each, found in ((single, finds), (optimizer, finds and dist.get_rank() == dist.get_world_size() - 1)):
                each.grad_scale = torch.tensor(4.0) if scaled else None
                each.found_inf = torch.tensor(float(found))
                each.step()
                del each.grad_scale, each.found_inf
            assert_same(params, wholes)


def steps_are_measured_as_on_one_process():
    wholes, params, single, optimizer = pair("AdamW", {"lr": 0.1})
    for index in range(3):
        give_grads(wholes, params, index)
        with single.measure_step() as expected:
            single.step()
        with optimizer.measure_step() as found:
            optimizer.step()
        for mine, theirs in zip(found[0], expected[0], strict=True):
            assert mine.dtype == torch.float64 and mine.shape == ()
            assert_alike(mine)
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def functions_of_utils_know_parts():
    from optim_ext import utils

    for norm_type in (2.0, 1.0, float("inf")):
        wholes, params = made()
        give_grads(wholes, params, 0)
        grads = [p.grad for p in params.values()]
        total = utils.get_total_norm(grads, norm_type)
        expected = torch.nn.utils.get_total_norm([p.grad for p in wholes.values()], norm_type)
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
        with CommDebugMode() as communication:
            norm = utils.clip_grad_norm_(params.values(), 0.5, norm_type)
        assert communication.get_total_counts() == groups_of_layouts() and type(norm) is torch.Tensor
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(wholes.values(), 0.5, norm_type))
        for name, whole in wholes.items():
            torch.testing.assert_close(full(params[name].grad), whole.grad)
        utils.clip_grad_value_(params.values(), 0.01)
        torch.nn.utils.clip_grad_value_(wholes.values(), 0.01)
        for name, whole in wholes.items():
            torch.testing.assert_close(full(params[name].grad), whole.grad)


def optimizers_are_clipped_by_one_norm():
    from optim_ext import utils

    wholes, params = made()
    names = list(wholes)

    def both(of):
        return optim_ext.SGD([of[n] for n in names[::2]], lr=0.1), optim_ext.AdamW([of[n] for n in names[1::2]], lr=0.1)

    single, several = both(wholes), both(params)
    for index in range(6):
        give_grads(wholes, params, index)
        if index == 3:
            for each in (single, several):
                utils.share_grad_policy(each, max_norm=0.3, skip_nonfinite=True)
        if index < 3:
            norms = [utils.clip_optimizers(each, 0.5) for each in (single, several)]
            torch.testing.assert_close(norms[1], norms[0])
        for each in (*single, *several):
            each.step()
        for name, whole in wholes.items():
            torch.testing.assert_close(full(params[name].detach()), whole.detach(), rtol=1e-5, atol=1e-6)


class Holder(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = nn.ParameterList(params)


def averages_follow_in_the_step():
    """By the same pass, with the bits of one process, and nothing is communicated."""
    averages = optim_ext.swa_utils
    wholes, params, single, optimizer = pair("AdamW", {"lr": 0.1})
    found = []
    for of, each in ((wholes, single), (params, optimizer)):
        model = Holder(list(of.values()))
        averaged = averages.AveragedModel(model, multi_avg_fn=averages.get_ema_multi_avg_fn(0.9))
        each.average_into(averaged, model)
        found.append((model, averaged))
    for index in range(6):
        give_grads(wholes, params, index, ["even", "plain"] if index == 3 else None)
        single.step()
        with CommDebugMode() as communication:
            optimizer.step()
        assert communication.get_total_counts() == (groups_of_layouts() if index == 0 else 0)
        names = list(params)
        averaged = dict(zip(names, found[1][1].parameters(), strict=True))
        assert_same(averaged, dict(zip(names, found[0][1].parameters(), strict=True)), "average")


def gradscaler_trains_as_with_torchs_class():
    """Unscaling in its own step, before, or in ours, with an infinity in the part of one process."""
    for options in ({"fused": False}, {"fused": True}):
        for unscales_before in (False, True):
            results = []
            for package in (torch.optim, optim_ext):
                model, optimizer = fsdp(package, "AdamW", {"lr": 0.01, **options})
                scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
                for index in range(4):
                    torch.manual_seed(index)
                    loss = nn.functional.cross_entropy(model(torch.randn(8, 10)), torch.randint(0, 3, (8,)))
                    scaler.scale(loss).backward()
                    if index == 2 and dist.get_rank() == 0:
                        next(model.parameters()).grad.to_local().view(-1)[0] = float("inf")
                    if unscales_before:
                        scaler.unscale_(optimizer)
                        if package is optim_ext:
                            optimizer.clip_grad_norm(1.0)
                        else:
                            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                assert scaler.get_scale() == 4.0
                results.append([full(p.detach()) for p in model.parameters()])
            torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)


def mixed_precision_trains_as_with_torchs_class():
    results = []
    for package in (torch.optim, optim_ext):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model, optimizer = fsdp(package, mp_policy=policy)
        for index in range(3):
            torch.manual_seed(index)
            nn.functional.cross_entropy(model(torch.randn(8, 10)).float(), torch.randint(0, 3, (8,))).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([full(p.detach()) for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)
    assert_native(optimizer)


def a_model_whose_parts_are_kept_on_the_host_trains_as_with_torchs_class():
    """Parameters, gradients and state are on the CPU between the passes, wherever these run."""
    results = []
    for package in (torch.optim, optim_ext):
        model, optimizer = fsdp(package, offload_policy=CPUOffloadPolicy(pin_memory=False))
        for index in range(5):
            backward(model, index)
            assert {p.grad.device.type for p in model.parameters()} == {"cpu"}
            if package is optim_ext:
                optimizer.clip_grad_norm(0.5)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append([full(p.detach()) for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)
    assert_native(optimizer)


def tensor_parallelism_trains_as_with_torchs_class():
    results = []
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    for package in (torch.optim, optim_ext):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        optimizer = package.AdamW(model.parameters(), lr=0.01)
        for index in range(5):
            torch.manual_seed(index)
            model(torch.randn(6, 8)).square().sum().backward()
            if package is optim_ext:
                optimizer.clip_grad_norm(0.5)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append([full(p.detach()) for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=2e-5, atol=2e-5)
    assert_native(optimizer)


def what_is_asked_of_an_optimizer_beside_its_options_knows_parts():
    """A policy from the constructor, gradients that a step is given, parameters that are dropped, state that is copied."""
    wholes, params, single, optimizer = pair("AdamW", {"lr": 0.1, "max_norm": 0.5, "skip_nonfinite": True})
    rows = layouts()
    for index in range(6):
        generator = torch.Generator().manual_seed(index)
        grads = {name: torch.randn(whole.shape, generator=generator) for name, whole in wholes.items()}
        if index == 2:
            grads["even"][0, 0] = float("inf")
        if index == 3:
            single.drop([wholes["even"], wholes["plain"]])
            optimizer.drop([params["even"], "plain"])
            assert params["even"] not in optimizer.state and len(optimizer.state) == len(wholes) - 2
        if index == 4:
            saved = optimizer.state_dict()
            kept = {name: full(optimizer.state[params[name]]["exp_avg"]).clone() for name in ("uneven", "copies")}
            optimizer.load_state_dict(saved, copy=True)
        parts = {name: spread(grad.clone(), *rows[name][:2]) if name in rows else grad for name, grad in grads.items()}
        names = optimizer.param_groups[0]["param_names"]
        single.step(grads=[grads[name] for name in names])
        optimizer.step(grads={name: parts[name] for name in names})
        assert all(p.grad is None for p in params.values())
        assert_same(params, wholes, f"value {index}")
        torch.testing.assert_close(optimizer.grad_policy.last_norm, single.grad_policy.last_norm, rtol=1e-6, atol=0)
    assert optimizer.grad_policy.skipped_steps == single.grad_policy.skipped_steps == 1
    for name, value in kept.items():  # of which nothing has been written to
        assert torch.equal(full(saved["state"][names.index(name)]["exp_avg"]), value)


CASES = [
    steps_have_the_bits_of_one_process, a_step_is_no_collective, small_steps_are_repeated,
    steps_of_some_parameters_have_the_bits_of_one_process, several_groups_have_options_of_their_own,
    a_group_that_is_left_to_torch_steps_beside_the_others, nothing_brought_to_another_layout_is_kept,
    local_tensors_may_be_replaced, nothing_is_kept_alive_between_steps,
    gradients_of_other_layouts_are_brought_to_the_parameters, meshes_that_are_equal_are_one, a_gradient_that_is_being_communicated_is_waited_for,
    bad_input_is_refused_on_all_processes_alike, a_plain_gradient_of_a_dtensor_is_refused, a_partial_parameter_is_refused,
    local_tensors_with_operations_of_their_own_are_left_to_torch,
    rules_about_whole_tensors_step_copies_natively, rules_about_whole_tensors_have_the_bits_of_one_process,
    rules_about_whole_tensors_clip_and_skip, what_an_owner_refuses_no_process_waits_for,
    a_gradient_that_one_process_has_wrong_is_refused_by_all,
    rules_take_norms_of_all_parts, options_decide_whether_norms_are_taken,
    a_step_that_one_process_refuses_is_taken_by_none, a_parameter_that_is_there_twice_has_no_norm_of_the_whole,
    explain_says_what_is_sharded,
    a_model_that_fsdp_has_cut_trains_as_with_torchs_class, checkpoints_go_into_and_out_of_torchs_class,
    then_saves, then_resumes, objects_do_not_accumulate, norms_are_of_all_parts, a_policy_decides_alike_on_all_processes,
    stages_are_put_together_by_a_group, a_process_without_gradients_joins, processes_that_disagree_on_a_gradient_all_refuse_it,
    gradients_of_other_layouts_are_brought_once, gradscalers_decision_is_that_of_all_processes,
    steps_are_measured_as_on_one_process, functions_of_utils_know_parts, optimizers_are_clipped_by_one_norm,
    averages_follow_in_the_step, gradscaler_trains_as_with_torchs_class, mixed_precision_trains_as_with_torchs_class,
    a_model_whose_parts_are_kept_on_the_host_trains_as_with_torchs_class,
    tensor_parallelism_trains_as_with_torchs_class, what_is_asked_of_an_optimizer_beside_its_options_knows_parts,
]  # fmt: skip

if __name__ == "__main__":
    serve(CASES)
