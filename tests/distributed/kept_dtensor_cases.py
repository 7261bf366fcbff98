"""What test_kept_dtensors.py runs on several processes: see ranks.py. Every process knows the whole of all tensors, so that
it can compare what it has of parameters and state with what one process makes of the whole."""

import copy
import functools
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, ON_CPU
from kept import TAKING, WAYS, name_of
from lockstep import copy_of
from parts import part_of, spread
from ranks import serve
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from user_rules import twins

import optim_ext
from optim_ext import checkpoints, swa_utils

FOLDER = Path(sys.argv[3] if __name__ == "__main__" else ".")
ADAMW = next(spec for spec in TAKING if spec.name == "AdamW")
MIXED = {"param_precision": "remainder", "state_precision": "q8"}  # keeps a twin, codes, exponents and a key
FEW = [
    MIXED,
    {"param_precision": "stochastic", "state_precision": "bf16"},
    {"param_precision": "kahan", "state_precision": "native"},
]


@functools.cache
def line():
    return init_device_mesh(DEVICE.type, (dist.get_world_size(),))


@functools.cache
def layouts():
    """By name: the mesh, the placements and the shape of the whole tensor. Those of 16 rows and more have state in 8 bits
    where that is asked for."""
    rows = {
        "rows": (line(), [Shard(0)], (64, 100)),
        "uneven rows": (line(), [Shard(0)], (33, 70)),
        "few": (line(), [Shard(0)], (5, 3)),
        "empty": (line(), [Shard(0)], (1, 7)),
        "vector": (line(), [Shard(0)], (301,)),
        "columns": (line(), [Shard(1)], (16, 256)),
        "blocks": (line(), [Shard(1)], (16, 3, 64)),
        "few columns": (line(), [Shard(1)], (3, 10)),
        "inner": (line(), [Shard(2)], (4, 3, 10)),
        "copies": (line(), [Replicate()], (32, 80)),
        "turned": (line(), [Shard(0)], (6, 15)),
    }
    if dist.get_world_size() == 4:
        square = init_device_mesh(DEVICE.type, (2, 2), mesh_dim_names=("a", "b"))
        rows |= {
            "hybrid": (square, [Replicate(), Shard(0)], (34, 70)),
            "rows and columns": (square, [Shard(0), Shard(1)], (32, 128)),
            "few rows and columns": (square, [Shard(0), Shard(1)], (5, 7)),
            "two inner": (square, [Shard(1), Shard(2)], (3, 5, 7)),
            "rows twice": (square, [Shard(0), Shard(0)], (37, 70)),
            "on half of the mesh": (square["b"], [Shard(0)], (19, 70)),
        }
    return rows


def drawn(shape, generator, name=""):
    if name == "turned":
        return torch.randn(shape[::-1], generator=generator).bfloat16().t()
    return torch.randn(shape, generator=generator).bfloat16()


def made(dtype=torch.bfloat16, rows=None):
    generator = torch.Generator().manual_seed(0)
    rows = layouts() if rows is None else rows
    wholes = {name: drawn(shape, generator, name).to(dtype) for name, (_, _, shape) in rows.items()}
    params = {name: nn.Parameter(spread(wholes[name], *rows[name][:2])) for name in rows}
    wholes["plain"] = drawn((17, 33), generator).to(dtype)
    params["plain"] = nn.Parameter(wholes["plain"].clone())
    return {name: nn.Parameter(whole.clone()) for name, whole in wholes.items()}, params


def give_grads(wholes, params, index, scale=1.0, whole_numbers=False):
    """Both the same, part by part. Sums of squares of whole numbers are exact in any order."""
    generator = torch.Generator().manual_seed(100 + index)
    for name, whole in wholes.items():
        grad = torch.randn(whole.shape, generator=generator)
        grad = ((grad * 4).round() if whole_numbers else grad).to(whole.dtype) * scale
        whole.grad = grad
        p = params[name]
        p.grad = spread(grad.clone(), p.device_mesh, p.placements) if isinstance(p, DTensor) else grad.clone()


def assert_same_bits(tensor, whole, what):
    mine, theirs = part_of(tensor.detach(), whole.detach())
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, (what, mine, theirs)
    bits = [each.reshape(-1).contiguous().view(torch.uint8) for each in (mine, theirs)]
    assert torch.equal(*bits), (what, mine, theirs)


def assert_same(params, optimizer, wholes, single, what):
    for name, whole in wholes.items():
        assert_same_bits(params[name], whole, f"{what}: {name}")
        ours, theirs = optimizer.state[params[name]], single.state[whole]
        assert set(ours) == set(theirs), (what, name, set(ours), set(theirs))
        for key, value in theirs.items():
            mine = ours[key]
            if not isinstance(value, torch.Tensor):
                assert mine == value
                continue
            is_plain = key == "rounding_key" or value.dim() == 0 or not isinstance(params[name], DTensor)
            assert isinstance(mine, DTensor) != is_plain, (what, name, key)
            assert_same_bits(mine, value, f"{what}: {key} of {name}")


def pair(spec, way, dtype=torch.bfloat16, rows=None, **options):
    wholes, params = made(dtype, rows)
    options = {**copy_of(spec.typical), **way, "min_q8_size": 256, **options}
    single, optimizer = (spec.ours(list(of.items()), **copy_of(options)) for of in (wholes, params))
    return wholes, params, single, optimizer


def steps_have_the_bits_of_one_process():
    for number, spec in enumerate(spec for spec in TAKING if not spec.whole_tensors):
        for way in WAYS if spec is ADAMW else FEW[number % 3 :][:1]:
            wholes, params, single, optimizer = pair(spec, way)
            for index in range(3):
                give_grads(wholes, params, index)
                single.step()
                optimizer.step()
            assert_same(params, optimizer, wholes, single, f"{spec.name} {name_of(way)}")
            assert all(report.native for report in optim_ext.explain(optimizer))


def rules_written_in_python_have_the_bits_of_the_built_in_one():
    for way in FEW:
        wholes, params, single, _ = pair(ADAMW, way)
        optimizer = twins.Adam(
            list(params.items()),
            **copy_of(ADAMW.typical),
            **way,
            **({} if "weight_decay" in ADAMW.typical else {"weight_decay": 1e-2}),
            decoupled_weight_decay=True,
            min_q8_size=256,
        )
        for index in range(3):
            give_grads(wholes, params, index)
            single.step()
            optimizer.step()
        assert_same(params, optimizer, wholes, single, f"rule {name_of(way)}")


def float32_parameters_have_state_in_few_bits():
    wholes, params, single, optimizer = pair(
        ADAMW, {"state_precision": {"exp_avg": "q8", "exp_avg_sq": "bf16"}}, torch.float32
    )
    for index in range(3):
        give_grads(wholes, params, index)
        single.step()
        optimizer.step()
    assert_same(params, optimizer, wholes, single, "float32")
    assert optimizer.state[params["rows"]]["exp_avg::scale"].shape == (64, 2)


def local_tensors_and_state_may_be_replaced():
    """As FSDP does when a module is moved or loaded, and whoever changes options between steps."""
    wholes, params, single, optimizer = pair(ADAMW, MIXED)
    for index in range(8):
        give_grads(wholes, params, index)
        if index == 2:
            for p in params.values():
                if isinstance(p, DTensor):
                    p._local_tensor = p._local_tensor.detach().clone()
        if index == 4:
            for each in (single, optimizer):
                each.load_state_dict(copy.deepcopy(each.state_dict()))
        if index == 6:
            for each in (single, optimizer):
                each.param_groups[0].update(param_precision="kahan", state_precision="bf16")
        single.step()
        optimizer.step()
        assert_same(params, optimizer, wholes, single, f"step {index}")


def what_a_layout_does_not_allow_is_refused_alike():
    """By name, when the optimizer is made and when options change, with nothing written."""
    world = dist.get_world_size()
    cases = [([Shard(1)], (16, 100), "q8", r"cut blocks of 64 elements.*use 'bf16' or 'fp32'")] if world > 1 else []
    if world == 4:
        square = init_device_mesh(DEVICE.type, (2, 2))
        strided = [_StridedShard(0, split_factor=2), Shard(0)]
        cases += [(strided, (32, 100), state, r"do not say where its parts are") for state in ("q8", "bf16")]
    for places, shape, state, message in cases:
        mesh = line() if len(places) == 1 else square
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        part = (
            spread(whole, mesh, places)._local_tensor if len(places) == 1 else whole.chunk(4)[dist.get_rank()].clone()
        )
        p = nn.Parameter(DTensor.from_local(part, mesh, places, shape=whole.shape, stride=whole.stride()))
        with pytest.raises(ValueError, match=f"(?s)parameter 'weight': .*{message}"):
            optim_ext.AdamW([("weight", p)], state_precision=state, min_q8_size=1)
        optimizer = optim_ext.AdamW([("weight", p)], param_precision="remainder", min_q8_size=1)
        p.grad = DTensor.from_local(torch.ones_like(part), mesh, places, shape=whole.shape, stride=whole.stride())
        optimizer.step()  # where nothing is left to chance any layout will do
        before = p.to_local().clone(), optimizer.state[p]["param_remainder"].to_local().clone()
        optimizer.param_groups[0]["state_precision"] = state
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert torch.equal(before[0], p.to_local()) and torch.equal(
            before[1], optimizer.state[p]["param_remainder"].to_local()
        )
        optimizer.param_groups[0]["state_precision"] = "native"
        optimizer.step()
    turned = torch.zeros(16, 8, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    p = nn.Parameter(spread(turned, line(), [Shard(0)]))
    with pytest.raises(ValueError, match="order of memory"):
        optim_ext.AdamW([p], state_precision="q8", min_q8_size=1)


def strided_shards_are_kept_without_chance():
    """Tensor parallelism below FSDP: what goes by elements alone has the bits of one process."""
    if dist.get_world_size() != 4:
        return
    square = init_device_mesh(DEVICE.type, (2, 2))
    places, whole = [_StridedShard(0, split_factor=2), Shard(0)], torch.randn(8, 3).bfloat16()
    dist.broadcast(whole, 0)
    outer, inner = square.get_coordinate()

    def cut(tensor):
        part = tensor.chunk(2)[inner].chunk(2)[outer].clone()
        return DTensor.from_local(part, square, places, shape=tensor.shape, stride=tensor.stride())

    single, p = nn.Parameter(whole), nn.Parameter(cut(whole))
    for precision in ("master", "remainder", "kahan"):
        one, optimizer = (optim_ext.AdamW([of], lr=0.01, param_precision=precision) for of in (single, p))
        for index in range(3):
            single.grad = torch.full_like(single, 0.1 + index)
            p.grad = cut(single.grad)
            one.step()
            optimizer.step()
        assert torch.equal(cut(single.detach()).to_local(), p.detach().to_local())
        for key, value in one.state[single].items():
            if value.dim():
                assert torch.equal(cut(value).to_local(), optimizer.state[p][key].to_local()), key


def clipping_skipping_scaling_and_groups_meet_it():
    for way in FEW:
        for flags in ({}, {"foreach": True}, {"fused": True}):
            wholes, params = made()
            names = list(wholes)
            optimizers = []
            for of in (wholes, params):
                groups = [
                    {"params": [(name, of[name]) for name in names[::2]], **way},
                    {"params": [(name, of[name]) for name in names[1::2]], "lr": 0.003},
                ]
                optimizers.append(
                    optim_ext.AdamW(
                        groups,
                        lr=0.01,
                        min_q8_size=256,
                        max_norm=1.0,
                        skip_nonfinite=True,
                        param_precision="master",
                        **flags,
                    )
                )
            single, optimizer = optimizers
            for index in range(5):
                give_grads(wholes, params, index, whole_numbers=True)
                if index == 2:
                    wholes["rows"].grad[-1, -1] = math.inf  # in the part of the last process
                    p = params["rows"]
                    p.grad = spread(wholes["rows"].grad.clone(), p.device_mesh, p.placements)
                for each in (single, optimizer):
                    if flags.get("fused"):
                        each.grad_scale, each.found_inf = torch.tensor(4.0), torch.tensor(0.0)
                    each.step()
                assert_same(params, optimizer, wholes, single, f"{name_of(way)} {flags} {index}")
                if flags.get("fused") and index != 2:
                    for name, whole in wholes.items():
                        assert_same_bits(params[name].grad, whole.grad, f"gradient of {name}")
            assert int(optimizer.skipped_steps) == 1


class Holder(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = nn.ParameterList(params)


def averaged_by(optimizer, params, masters):
    """An average of the parameters that the steps of an optimizer keep."""
    model = Holder(list(params.values()))
    dtype = {"dtype": torch.float32} if masters else {}
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), **dtype)
    optimizer.average_into(averaged, model, masters=masters)
    return averaged, model


def assert_same_averages(ours, theirs, what):
    for mine, other in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        assert_same_bits(mine, other, f"average, {what}")


def assert_close(params, optimizer, wholes, single, what):
    """Where the last bit of a norm may be another: so may be that of a step, and by chance one bfloat16 number in many."""
    for name, whole in wholes.items():
        ours, theirs = optimizer.state[params[name]], single.state[whole]
        assert set(ours) == set(theirs), (what, name)
        if "rounding_key" in theirs:
            assert torch.equal(ours["rounding_key"], theirs["rounding_key"])
        pairs = [part_of(params[name].detach(), whole.detach())]
        if isinstance(params[name], DTensor):
            for key in set(theirs) - {"rounding_key", "step"}:
                pairs.append(part_of(ours[key].detach(), theirs[key].detach()))
        for mine, other in pairs:
            assert mine.dtype == other.dtype and mine.shape == other.shape
            assert (mine != other).sum() <= max(1, mine.numel() // 50), (what, name)
        mine, other = (value.float() for value in pairs[0])
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-6)


def rules_about_norms_take_it():
    """LAMB, LARS and what is written like them: the norm is that of the masters, the words are those of the whole."""
    classes = [(spec.ours, spec.typical) for spec in TAKING if spec.ours._measures_tensors]
    classes += [(cls, {"lr": 0.1}) for cls in (twins.LAMB, twins.LARS) if ON_CPU]  # elsewhere rules do not take it
    for cls, typical in classes:
        for way in FEW:
            if cls is twins.LARS and way["state_precision"] != "native":
                continue
            wholes, params = made()
            options = {**copy_of(typical), **way, "min_q8_size": 256}
            single, optimizer = (cls(list(of.items()), **copy_of(options)) for of in (wholes, params))
            for index in range(3):
                give_grads(wholes, params, index)
                single.step()
                optimizer.step()
            assert_close(params, optimizer, wholes, single, f"{cls.__name__} {name_of(way)}")
            assert all(report.native for report in optim_ext.explain(optimizer))


def rules_about_whole_tensors_have_the_bits_of_one_process():
    """By owners, or gathered where several dimensions of a mesh cut: also where options change, state is loaded, averages are of
    masters, and beside groups that are kept as torch does."""
    for spec in TAKING:
        if not spec.ours._about_whole_tensors:
            continue
        rows = {name: row for name, row in layouts().items() if len(row[2]) == 2 or spec.name != "Muon"}
        for way in WAYS if dist.get_world_size() == 2 else WAYS[::3]:
            wholes, params = made(rows=rows)
            options = {**copy_of(spec.typical), "min_q8_size": 256}
            names = list(wholes)
            single, optimizer = (
                spec.ours(
                    [{"params": [("few", of["few"])]}, {"params": [(n, of[n]) for n in names if n != "few"], **way}],
                    **copy_of(options),
                )
                for of in (wholes, params)
            )
            theirs, ours = (averaged_by(each, of, True) for each, of in ((single, wholes), (optimizer, params)))
            for index in range(6):
                what = f"{spec.name} {name_of(way)} {index}"
                give_grads(wholes, params, index)
                if index == 2:
                    for each in (single, optimizer):
                        saved = copy.deepcopy(each.state_dict())
                        each.load_state_dict(saved)
                    assert_same(params, optimizer, wholes, single, f"{what}, loaded")
                if index >= 4:  # in another way, and back to what torch keeps
                    other = FEW[0] if index == 4 else {"param_precision": "native", "state_precision": "native"}
                    for each in (single, optimizer):
                        each.param_groups[1].update(other)
                for each in (single, optimizer):
                    each.step()
                assert_same(params, optimizer, wholes, single, what)
                assert_same_averages(ours, theirs, what)
            assert all(report.native for report in optim_ext.explain(optimizer))


def state_of_whole_tensors_that_torch_keeps_comes_into_other_ways():
    """Before the first step, when nothing but its shape says what is a row or column of the whole; and back."""
    for spec in TAKING:
        if not spec.ours._about_whole_tensors:
            continue
        rows = {name: row for name, row in layouts().items() if len(row[2]) == 2 or spec.name != "Muon"}
        native = pair(spec, {}, rows=rows)
        give_grads(native[0], native[1], 0)
        for each in native[2:]:
            each.step()
        for way in FEW:
            kept, back = pair(spec, way, rows=rows), pair(spec, {}, rows=rows)
            for index, (these, before) in enumerate(((kept, native), (back, kept))):
                for each, other in zip(these[2:], before[2:], strict=True):
                    each.load_state_dict(copy.deepcopy(other.state_dict()))
                give_grads(these[0], these[1], index)
                for each in these[2:]:
                    each.step()
                wholes, params, single, optimizer = these
                assert_same(params, optimizer, wholes, single, f"{spec.name} {name_of(way)} {index}")


def a_step_of_whole_tensors_that_is_skipped_draws_nothing():
    for spec in TAKING:
        if not spec.ours._about_whole_tensors:
            continue
        rows = {name: row for name, row in layouts().items() if len(row[2]) == 2}
        for way in FEW:
            wholes, params, single, optimizer = pair(spec, way, rows=rows, skip_nonfinite=True)
            for index in range(3):
                give_grads(wholes, params, index)
                if index == 1:
                    wholes["rows"].grad[-1, -1] = math.inf  # in the part of the last process
                    p = params["rows"]
                    p.grad = spread(wholes["rows"].grad.clone(), p.device_mesh, p.placements)
                single.step()
                optimizer.step()
                assert_same(params, optimizer, wholes, single, f"{spec.name} {name_of(way)} {index}")
            assert int(optimizer.skipped_steps) == 1


def strided_shards_of_whole_tensors_take_chance():
    """Who steps the whole knows where each element is."""
    if dist.get_world_size() != 4:
        return
    square = init_device_mesh(DEVICE.type, (2, 2))
    places = [_StridedShard(0, split_factor=2), Shard(0)]
    outer, inner = square.get_coordinate()

    def cut(tensor):
        part = tensor.chunk(2)[inner].chunk(2)[outer].clone()
        return DTensor.from_local(part, square, places, shape=tensor.shape, stride=tensor.stride())

    for way in FEW:
        whole = torch.randn((32, 70), generator=torch.Generator().manual_seed(1)).bfloat16()
        single, p = nn.Parameter(whole), nn.Parameter(cut(whole))
        one, optimizer = (optim_ext.Muon([("weight", of)], lr=0.01, min_q8_size=1, **way) for of in (single, p))
        for index in range(3):
            single.grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2 + index)).bfloat16()
            p.grad = cut(single.grad)
            one.step()
            optimizer.step()
        assert torch.equal(cut(single.detach()).to_local(), p.detach().to_local())
        for key, value in one.state[single].items():
            if value.dim() == 2:
                assert torch.equal(cut(value).to_local(), optimizer.state[p][key].to_local()), key


def averages_follow():
    """Of parameters as they are, in the step; and of their float32 values, after it."""
    for masters in (False, True):
        for way in FEW:
            wholes, params, single, optimizer = pair(ADAMW, way)
            theirs, ours = (averaged_by(each, of, masters) for each, of in ((single, wholes), (optimizer, params)))
            for index in range(4):
                give_grads(wholes, params, index)
                single.step()
                optimizer.step()
            assert_same(params, optimizer, wholes, single, name_of(way))
            assert_same_averages(ours, theirs, f"masters={masters}, {name_of(way)}")


def masters_come_out_and_go_in():
    for way in FEW:
        wholes, params, single, optimizer = pair(ADAMW, way)
        for index in range(2):
            give_grads(wholes, params, index)
            with optimizer.measure_step() as found, single.measure_step() as expected:
                single.step()
                optimizer.step()
            torch.testing.assert_close(found[0].param, expected[0].param, rtol=1e-12, atol=0)
            torch.testing.assert_close(found[0].update, expected[0].update, rtol=1e-12, atol=0)
        out, theirs = dict(optimizer.master_params()), dict(single.master_params())
        for name, value in theirs.items():
            assert isinstance(out[name], DTensor) == isinstance(params[name], DTensor)
            assert_same_bits(out[name], value, f"master of {name}")
        saved, plain = (checkpoints.to_torch_state_dict(each)["state"] for each in (optimizer, single))
        for number, entry in plain.items():
            for key, value in entry.items():
                assert_same_bits(saved[number][key], value, key)
        # What is loaded is what was saved, and steps go on alike.
        for each, values in ((single, theirs), (optimizer, out)):
            each.load_master_params({name: value * 1.0009765625 for name, value in values.items()})
        give_grads(wholes, params, 5)
        single.step()
        optimizer.step()
        assert_same(params, optimizer, wholes, single, "after masters were loaded")
        if dist.get_world_size() > 1:
            before = params["rows"].to_local().clone()
            with pytest.raises(ValueError, match="parameter 'rows': it is a DTensor with .*, and its master"):
                optimizer.load_master_params({"rows": theirs["rows"]})
            assert torch.equal(before, params["rows"].to_local())


def a_compiled_step_is_taken_eagerly():
    wholes, params, single, optimizer = pair(ADAMW, MIXED, rows={"rows": layouts()["rows"]})
    step = torch.compile(optimizer.step, backend="eager")
    for index in range(2):
        give_grads(wholes, params, index)
        single.step()
        step()
    assert_same(params, optimizer, wholes, single, "compiled")


def flat_shards_of_fsdp_take_what_goes_by_elements():
    """Parameters of FullyShardedDataParallel are vectors that do not say which elements of what they are."""
    torch.manual_seed(0)
    for way in ({"param_precision": "remainder"}, {"param_precision": "master", "state_precision": "fp32"}):
        model = FullyShardedDataParallel(nn.Linear(10, 6, dtype=torch.bfloat16), device_id=DEVICE)
        (p,) = model.parameters()
        whole = nn.Parameter(
            torch.randn(p.numel() * dist.get_world_size(), generator=torch.Generator().manual_seed(2)).bfloat16()
        )
        begin = p.numel() * dist.get_rank()
        with torch.no_grad():
            p.copy_(whole[begin : begin + p.numel()])
        optimizer, single = (optim_ext.AdamW([of], lr=0.01, **way) for of in (p, whole))
        for index in range(3):
            whole.grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(index)).bfloat16()
            p.grad = whole.grad[begin : begin + p.numel()].clone()
            optimizer.step()
            single.step()
        assert torch.equal(p, whole[begin : begin + p.numel()])
        for way in (
            {"param_precision": "stochastic"},
            {"state_precision": "q8"},
            {"state_precision": {"exp_avg": "bf16"}},
        ):
            with pytest.raises(ValueError, match="shard of FullyShardedDataParallel, .* use param_precision 'master'"):
                optim_ext.AdamW(model.parameters(), **way)


def flat_shards_of_fsdp_go_through_its_checkpoint():
    """Where all state is of one dtype, which is all that FullyShardedDataParallel puts together."""
    if dist.get_world_size() == 1:
        return  # nothing is cut

    def trained(way, steps):
        torch.manual_seed(0)
        model = FullyShardedDataParallel(
            nn.Linear(10, 6, dtype=torch.bfloat16), use_orig_params=True, device_id=torch.device("cpu")
        )
        optimizer = optim_ext.AdamW(model.parameters(), lr=0.01, **way)
        for index in range(steps):
            torch.manual_seed(index)
            model(torch.randn(4, 10).bfloat16()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    model, optimizer = trained({"param_precision": "master"}, 3)
    other, resumed = trained({"param_precision": "master"}, 0)
    for each in (model, other):
        FullyShardedDataParallel.set_state_dict_type(each, StateDictType.SHARDED_STATE_DICT)
    state = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(other, resumed, state))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) and optimizer.state[p].keys() == resumed.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][key]), key
    for way in ({"param_precision": "remainder"}, {"param_precision": "kahan"}):
        with pytest.raises(AssertionError, match="Expected dtype == info.dtype"):
            FullyShardedDataParallel.optim_state_dict(*trained(way, 1))


def network(way, kind=optim_ext.AdamW, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 64), nn.LayerNorm(64), nn.Linear(64, 17)).bfloat16()
    whole = copy.deepcopy(model)
    for layer in model:
        fully_shard(layer, mesh=line())
    fully_shard(model, mesh=line())
    options = options or {"amsgrad": True}
    cls = functools.partial(kind, lr=0.01, min_q8_size=256, **way, **options)
    return model, cls(model.named_parameters()), whole, cls(whole.named_parameters())


def train(model, optimizer, whole, single, steps):
    for index in steps:
        give_grads(dict(whole.named_parameters()), dict(model.named_parameters()), index)
        single.step()
        optimizer.step()


def assert_network(model, optimizer, whole, single, what):
    assert_same(dict(model.named_parameters()), optimizer, dict(whole.named_parameters()), single, what)


def state_loads_back():
    """Into an optimizer that has not stepped, by torch.distributed.checkpoint's functions: sharded, nested or flattened, and
    gathered, which torch cannot do with the 16-bit integers of a remainder."""
    for number, way in enumerate(WAYS):
        kinds = [{"flatten_optimizer_state_dict": number % 2 == 0}]
        if way["param_precision"] != "remainder":
            kinds.append({"full_state_dict": True})
        for kind in kinds:
            options = StateDictOptions(**kind)
            model, optimizer, whole, single = network(way)
            train(model, optimizer, whole, single, range(2))
            weights, state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
            other, resumed, _, _ = network(way)
            set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
            assert_network(other, resumed, whole, single, f"{name_of(way)}, {kind}")
            train(other, resumed, whole, single, range(2, 4))
            assert_network(other, resumed, whole, single, f"{name_of(way)}, {kind}, trained on")


def state_of_whole_tensors_loads_back():
    for way in FEW:
        model, optimizer, whole, single = network(way, optim_ext.Adafactor, weight_decay=0.1)
        train(model, optimizer, whole, single, range(2))
        weights, state = copy.deepcopy(get_state_dict(model, optimizer))
        other, resumed, _, _ = network(way, optim_ext.Adafactor, weight_decay=0.1)
        set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state)
        assert_network(other, resumed, whole, single, f"Adafactor, {name_of(way)}")
        train(other, resumed, whole, single, range(2, 4))
        assert_network(other, resumed, whole, single, f"Adafactor, {name_of(way)}, trained on")


def then_saves():
    for number, way in enumerate(FEW):
        model, optimizer, whole, single = network(way)
        train(model, optimizer, whole, single, range(3))
        weights, state = get_state_dict(model, optimizer)
        checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=FOLDER / f"checkpoint {number}")


def then_resumes():
    """With the bits of one process that was not interrupted."""
    for number, way in enumerate(FEW):
        model, optimizer, whole, single = network(way)
        weights, state = get_state_dict(model, optimizer)
        checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=FOLDER / f"checkpoint {number}")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        for index in range(3):
            give_grads(dict(whole.named_parameters()), dict(model.named_parameters()), index)
            single.step()
        assert_network(model, optimizer, whole, single, f"{name_of(way)}, loaded")
        train(model, optimizer, whole, single, range(3, 6))
        assert_network(model, optimizer, whole, single, f"{name_of(way)}, trained on")


CASES = [
    steps_have_the_bits_of_one_process, rules_written_in_python_have_the_bits_of_the_built_in_one,
    float32_parameters_have_state_in_few_bits, local_tensors_and_state_may_be_replaced,
    what_a_layout_does_not_allow_is_refused_alike, strided_shards_are_kept_without_chance, rules_about_norms_take_it,
    rules_about_whole_tensors_have_the_bits_of_one_process,
    state_of_whole_tensors_that_torch_keeps_comes_into_other_ways, a_step_of_whole_tensors_that_is_skipped_draws_nothing,
    strided_shards_of_whole_tensors_take_chance, clipping_skipping_scaling_and_groups_meet_it, averages_follow,
    masters_come_out_and_go_in, a_compiled_step_is_taken_eagerly, flat_shards_of_fsdp_take_what_goes_by_elements,
    flat_shards_of_fsdp_go_through_its_checkpoint, state_loads_back, state_of_whole_tensors_loads_back, then_saves,
    then_resumes,
]  # fmt: skip

if __name__ == "__main__":
    serve(CASES)
