"""What test_processes.py runs on several processes: see ranks.py."""

import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from kept import WAYS, everything, give_grads, same
from ranks import serve
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from user_rules import twins

import optim_ext
from optim_ext import swa_utils

FOLDER = Path(sys.argv[3] if __name__ == "__main__" else ".")
ROWS = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"fused": True}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("Adagrad", {}),
    ("NAdam", {"foreach": True}),
]


def network(hidden=23):  # odd, so that shards are of two sizes
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, 3))


def backward(model, index):
    torch.manual_seed(100 * index + dist.get_rank())
    nn.functional.cross_entropy(model(torch.randn(8, 10)), torch.randint(0, 3, (8,))).backward()


def train(model, optimizer, steps, clip=lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 1.0)):
    for index in steps:
        backward(model, index)
        clip(model.parameters())
        optimizer.step()
        optimizer.zero_grad()


def values(model):
    return [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def side_by_side(run, rtol=2e-5, atol=2e-5, rows=ROWS):
    """run(optimizer class, options) returns parameters: with torch's class and with ours they must be the same."""
    for name, options in rows:
        theirs, ours = (run(getattr(package, name), options) for package in (torch.optim, optim_ext))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                mine, other, rtol=rtol, atol=atol, msg=lambda text, row=(name, options): f"{row}: {text}"
            )


def assert_native(optimizer):
    assert all(report.native for report in optim_ext.explain(optimizer))


def whole_mesh():
    return init_device_mesh(DEVICE.type, (dist.get_world_size(),))


def sharded(cls, options):
    mesh = whole_mesh()
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, cls(model.parameters(), **options)


def ddp():
    for view in (False, True):

        def run(cls, options, view=view):
            model = DistributedDataParallel(network(), bucket_cap_mb=0.001, gradient_as_bucket_view=view)
            optimizer = cls(model.parameters(), **options)
            for index in range(5):
                with model.no_sync():
                    backward(model, 2 * index)
                train(model, optimizer, [2 * index + 1])
            if cls.__module__.startswith("optim_ext"):
                assert_native(optimizer)
            return values(model)

        side_by_side(run)


def ddp_clips_in_the_step():
    """The norm of synchronised gradients is the same on every process, and so is what becomes of it."""
    results = []
    for how in ("torch", "armed", "policy"):
        model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
        optimizer = optim_ext.AdamW(model.parameters(), lr=0.01)
        if how == "policy":
            optimizer.set_grad_policy(max_norm=0.1, skip_nonfinite=True)
        clips = {
            "torch": lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.1),
            "armed": lambda parameters, optimizer=optimizer: optimizer.clip_grad_norm(0.1),
            "policy": lambda parameters: None,
        }
        train(model, optimizer, range(5), clips[how])
        results.append(values(model))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def zero():
    def run(cls, options):
        model = DistributedDataParallel(network())
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, **options)
        train(model, optimizer, range(5))
        if cls.__module__.startswith("optim_ext"):
            assert_native(optimizer)
        return values(model)

    side_by_side(run)


def fsdp1():
    for originals in (False, True):

        def run(cls, options, originals=originals):
            model = FullyShardedDataParallel(network(), use_orig_params=originals, device_id=DEVICE)
            optimizer = cls(model.parameters(), **options)
            train(model, optimizer, range(5), lambda parameters: model.clip_grad_norm_(1.0))
            with FullyShardedDataParallel.summon_full_params(model):
                return values(model)

        side_by_side(run)


def fsdp1_is_clipped_by_the_norm_of_a_group():
    """Its shards are ordinary tensors; the caller knows who has the others."""
    for norm_type in (2.0, 1.0, float("inf")):
        results = []
        for package in (torch.optim, optim_ext):
            model = FullyShardedDataParallel(network(), use_orig_params=True, device_id=DEVICE)
            optimizer = package.AdamW(model.parameters(), lr=0.01)
            for index in range(3):
                backward(model, index)
                if package is optim_ext:
                    norm = optimizer.clip_grad_norm(0.1, norm_type, process_group=dist.group.WORLD)
                else:
                    norm = model.clip_grad_norm_(0.1, norm_type)
                results.append(norm)
                optimizer.step()
                optimizer.zero_grad()
            with FullyShardedDataParallel.summon_full_params(model):
                results.append(values(model))
        torch.testing.assert_close(results[4:], results[:4], rtol=1e-5, atol=1e-6)


def fsdp1_norms_are_refused():
    """Its shards are ordinary tensors, of whose gradients no process knows the norm."""
    for originals in (False, True):
        model = FullyShardedDataParallel(network(), use_orig_params=originals, device_id=DEVICE)
        optimizer = optim_ext.AdamW(model.parameters())
        backward(model, 0)
        with pytest.raises(RuntimeError, match="shards of FullyShardedDataParallel"):
            optimizer.clip_grad_norm(1.0)
        optimizer.set_grad_policy(skip_nonfinite=True)
        with pytest.raises(RuntimeError, match="shards of FullyShardedDataParallel"):
            optimizer.step()
        assert not optimizer.state
        for cls in (optim_ext.LAMB, optim_ext.LARS, twins.LARS):
            with pytest.raises(RuntimeError, match="shard of FSDP"):
                cls(model.parameters(), lr=0.1).step()


def fsdp2():
    def run(cls, options):
        model, optimizer = sharded(cls, options)
        train(model, optimizer, range(5))
        if cls.__module__.startswith("optim_ext"):
            assert_native(optimizer)
        return values(model)

    side_by_side(run)


def fsdp2_checkpoints():
    """Into and out of torch's class, by torch.distributed.checkpoint."""
    for name, options in ROWS:
        for first, second in ((torch.optim, optim_ext), (optim_ext, torch.optim)):
            path = FOLDER / f"{name}-{first.__name__}"
            model, optimizer = sharded(getattr(first, name), options)
            train(model, optimizer, range(3))
            weights, state = get_state_dict(model, optimizer)
            checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=path)
            train(model, optimizer, range(3, 6))
            other, resumed = sharded(getattr(second, name), options)
            weights, state = get_state_dict(other, resumed)
            checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=path)
            set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state)
            train(other, resumed, range(3, 6))
            torch.testing.assert_close(values(other), values(model), rtol=2e-5, atol=2e-5)


def checkpoints_of_kept_state():
    """Ordinary parameters that all processes have, in every way to keep them: by torch.distributed.checkpoint, nested and
    flattened, bit for bit, into an optimizer that has not stepped."""
    for number, way in enumerate(WAYS):
        for flat in (False, True):
            path, options = FOLDER / f"kept-{number}-{flat}", StateDictOptions(flatten_optimizer_state_dict=flat)
            model, other = kept_network(), kept_network()
            optimizer, resumed = (optim_ext.AdamW(m.parameters(), amsgrad=True, **way) for m in (model, other))
            train_alike(model, optimizer, range(3))
            weights, state = get_state_dict(model, optimizer, options=options)
            checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=path)
            weights, state = get_state_dict(other, resumed, options=options)
            checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=path)
            set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state, options=options)
            assert same(everything(optimizer), everything(resumed)), way
            train_alike(model, optimizer, range(3, 5))
            train_alike(other, resumed, range(3, 5))
            assert same(everything(optimizer), everything(resumed)), way


def kept_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 64), nn.LayerNorm(64), nn.Linear(64, 3)).bfloat16()


def train_alike(model, optimizer, steps):
    """With the gradients that all processes would have after a reduction."""
    for index in steps:
        give_grads(list(model.parameters()), index)
        optimizer.step()


class Block(nn.Module):
    def __init__(self, width=10, hidden=23):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Part(nn.Module):
    """Some layers of a model, under the names that they have in it."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


class Run:
    """A training as torchtitan has it: a model in parts, cut block by block, for each part an optimizer and a schedule, and
    checkpoints in which all parts are one model and one optimizer, whose state is flattened."""

    flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, package, name, options, count, policy, seed=0):
        torch.manual_seed(seed)
        blocks = {str(i): Block() for i in range(2)}
        layers = {"embeddings": nn.Embedding(13, 10), **blocks, "norm": nn.LayerNorm(10), "output": nn.Linear(10, 13)}
        names, self.parts = list(layers), []
        for own in [names] if count == 1 else [names[:2], names[2:]]:
            part = Part({name: layers[name] for name in own})
            for layer in part.layers.values():
                fully_shard(layer, mesh=whole_mesh(), mp_policy=policy)
            self.parts.append(fully_shard(part, mesh=whole_mesh(), mp_policy=policy))
        self.optimizers = [getattr(package, name)(part.parameters(), **options) for part in self.parts]
        self.schedules = [LambdaLR(optimizer, lambda step: min(1, (step + 1) / 3)) for optimizer in self.optimizers]
        self.ours, self.losses, self.norms = package is optim_ext, [], []

    def clip(self, max_norm=0.5):
        if not self.ours:
            norm = torch.nn.utils.clip_grad_norm_([p for part in self.parts for p in part.parameters()], max_norm)
            return norm.full_tensor()
        if len(self.optimizers) > 1:
            return optim_ext.utils.clip_optimizers(self.optimizers, max_norm)
        return self.optimizers[0].clip_grad_norm(max_norm)

    def train(self, steps):
        for index in steps:
            torch.manual_seed(100 * index + dist.get_rank())
            x = torch.randint(0, 13, (4, 7))
            classes = (3 * x + 1) % 13
            for part in self.parts:
                x = part(x)
            loss = nn.functional.cross_entropy(x.float().flatten(0, 1), classes.flatten())
            loss.backward()
            self.norms.append(self.clip())
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            self.losses.append(loss.detach())
        return self

    def everything(self):
        """What DCP is to save and load: it calls state_dict() and load_state_dict() of each."""
        model = Stateful(self.parts, get_model_state_dict, partial(set_model_state_dict, options=NOT_ALL))
        optimizer = Stateful(
            list(zip(self.parts, self.optimizers, strict=True)),
            lambda pair: get_optimizer_state_dict(*pair, options=self.flat),
            lambda pair, state: set_optimizer_state_dict(*pair, optim_state_dict=state, options=self.flat),
        )
        return {"model": model, "optimizer": optimizer, "lr_scheduler": self.schedules[0]}

    def save(self, path):
        checkpoint.save(self.everything(), checkpoint_id=path)

    def resume(self, path):
        checkpoint.load(self.everything(), checkpoint_id=path)
        for schedule in self.schedules[1:]:
            schedule.load_state_dict(self.schedules[0].state_dict())
        return self

    def values(self):
        return [value for part in self.parts for value in values(part)]


NOT_ALL = StateDictOptions(strict=False)  # of the names in a state dict one part has its own only


class Stateful:
    """One entry of a checkpoint, of several things that each have a part of it."""

    def __init__(self, owners, get, set_):
        self.owners, self.get, self.set = owners, get, set_

    def state_dict(self):
        return {name: value for owner in self.owners for name, value in self.get(owner).items()}

    def load_state_dict(self, state):
        for owner in self.owners:
            self.set(owner, state)


def a_loop_as_torchtitans():
    """Torch's losses, norms and parameters, and checkpoints that either goes on from, with the same bits where one package
    did both."""
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    rows = [
        (("AdamW", {"lr": 0.01, "fused": True}, 2, MixedPrecisionPolicy()), {"rtol": 1e-4, "atol": 1e-5}),
        (("SGD", {"lr": 0.2, "momentum": 0.9}, 1, mixed), {"rtol": 4e-3, "atol": 4e-3}),
    ]
    packages, half = (torch.optim, optim_ext), 3
    for row, tolerance in rows:
        straight = {package: Run(package, *row) for package in packages}
        paths = {package: FOLDER / f"titan {row[0]} {package.__name__}" for package in packages}
        for package, run in straight.items():
            run.train(range(half)).save(paths[package])
            run.train(range(half, 2 * half))
            assert run.losses[-1] < run.losses[0] and max(run.norms) > 0.5
        for optimizer in straight[optim_ext].optimizers:
            assert_native(optimizer)
        theirs, ours = ([run.losses, run.norms, run.values()] for run in straight.values())
        torch.testing.assert_close(ours, theirs, **tolerance)
        for writer, reader in product(packages, packages):
            resumed = Run(reader, *row, seed=1).resume(paths[writer]).train(range(half, 2 * half))
            right = [straight[reader].losses[half:], straight[reader].norms[half:], straight[reader].values()]
            allowed = {"rtol": 0, "atol": 0} if writer is reader else tolerance
            torch.testing.assert_close([resumed.losses, resumed.norms, resumed.values()], right, **allowed)


def fsdp2_compiled():
    def run(cls, options):
        model, optimizer = sharded(cls, options)
        optimizer.step = torch.compile(optimizer.step, backend="aot_eager")
        train(model, optimizer, range(3))
        return values(model)

    side_by_side(run, rows=[("AdamW", {}), ("SGD", {"lr": 0.1, "momentum": 0.9})])


def fsdp2_finds_what_is_not_finite():
    """Each process in its own part: it is often asked by the one that has trouble alone."""
    model, optimizer = sharded(optim_ext.AdamW, {})
    backward(model, 0)
    assert optimizer.find_nonfinite() == []
    if dist.get_rank() == 1:
        next(model.parameters()).grad.to_local().view(-1)[:2] = torch.inf
    assert [found.grad for found in optimizer.find_nonfinite()] == [2] * dist.get_rank()


def fsdp2_averages():
    results = []
    for package in (torch.optim.swa_utils, swa_utils):
        model = network()
        average = package.AveragedModel(model, multi_avg_fn=package.get_ema_multi_avg_fn(0.9))
        fully_shard(model, mesh=whole_mesh())
        fully_shard(average.module, mesh=whole_mesh())
        optimizer = optim_ext.AdamW(model.parameters())
        if package is swa_utils:
            optimizer.average_into(average, model)
        for index in range(3):
            train(model, optimizer, [index])
            if package is not swa_utils:
                average.update_parameters(model)
        results.append(values(average.module))
    torch.testing.assert_close(results[1], results[0])


def averages(package, model, decay=0.9):
    """The mean and the exponential moving average of a model, of torch's package or ours."""
    ema = {"multi_avg_fn": package.get_ema_multi_avg_fn(decay)}
    return [package.AveragedModel(model), package.AveragedModel(model, **ema)]


@torch.no_grad()
def move(model):
    for p in model.parameters():
        p.mul_(1.5).add_(0.25)


def averages_of_parts_alone():
    """Of parameters that are laid out like their averages each process averages its own part, as if it were all there
    is: the bits of the whole model's average, and nothing is communicated."""
    whole, model = network(), network()
    expected, found = averages(swa_utils, whole), averages(swa_utils, model)
    ema = swa_utils.get_ema_multi_avg_fn(0.9)
    expected.append(expected[1])
    found.append(torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema))  # our function in torch's class
    for each in (model, *(average.module for average in found)):
        fully_shard(each, mesh=whole_mesh())
    for _ in range(3):
        for average in expected[:2]:
            average.update_parameters(whole)
        with CommDebugMode() as communication:
            for average in found:
                average.update_parameters(model)
        assert communication.get_total_counts() == 0
        move(whole)
        move(model)
    for right, average in zip(expected, found, strict=True):
        torch.testing.assert_close(values(average.module), values(right.module), rtol=0, atol=0)
    with found[1].swap_into(model), CommDebugMode() as communication:
        assert communication.get_total_counts() == 0
        torch.testing.assert_close(values(model), values(expected[1].module), rtol=0, atol=0)
    torch.testing.assert_close(values(model), values(whole), rtol=0, atol=0)


def averages_of_parts_that_are_replaced():
    """A DTensor may be given another part, as FSDP does when a module is converted or loaded."""
    model = network()
    average = averages(swa_utils, model)[1]
    for each in (model, average.module):
        fully_shard(each, mesh=whole_mesh())
    average.update_parameters(model)
    for each in (model, average.module):
        for p in each.parameters():
            p._local_tensor = torch.full_like(p._local_tensor, 2.0 if each is model else 1.0)
        average.update_parameters(model)
    expected = 1.0 + (1 - 0.9) * (2.0 - 1.0)
    for p in average.module.parameters():
        torch.testing.assert_close(p.to_local(), torch.full_like(p.to_local(), expected))
    for p in model.parameters():
        p._local_tensor = torch.zeros_like(p._local_tensor, dtype=torch.float64)
    average.update_parameters(model)
    for p in average.module.parameters():
        torch.testing.assert_close(p.to_local(), torch.full_like(p.to_local(), 0.9 * expected))


def averages_of_another_layout():
    """What is not laid out alike is torch's to average, part by part of the whole."""
    results = []
    for package in (torch.optim.swa_utils, swa_utils):
        model = network()
        found = averages(package, model)
        for each, placement in ((model, Shard(0)), *((average.module, Replicate()) for average in found)):
            for layer in each:
                for name, p in list(layer.named_parameters()):
                    setattr(layer, name, nn.Parameter(distribute_tensor(p.detach(), whole_mesh(), [placement])))
        for _ in range(3):
            for average in found:
                average.update_parameters(model)
            move(model)
        results.append([value for average in found for value in values(average.module)])
    torch.testing.assert_close(results[1], results[0])


def an_average_that_is_not_cut_is_refused():
    """Before anything is written: torch's copy would refuse it after the step."""
    for cut in ("the model", "the average"):
        model = network()
        average = averages(swa_utils, model)[1]
        fully_shard(model if cut == "the model" else average.module, mesh=whole_mesh())
        optimizer = optim_ext.AdamW(model.parameters())
        for call in (partial(optimizer.average_into, average), average.update_parameters, average.copy_to):
            with pytest.raises(ValueError, match="cut both in the same way"):
                call(model)
        assert average.n_averaged == 0
    # One that was asked for while neither was cut, as accelerate has it.
    model = network()
    optimizer = optim_ext.AdamW(model.parameters())
    average = averages(swa_utils, model)[1]
    optimizer.average_into(average)
    fully_shard(model, mesh=whole_mesh())
    optimizer.param_groups[0]["params"] = list(model.parameters())
    backward(model, 0)
    before = values(model)
    with pytest.raises(ValueError, match="cut both in the same way"):
        optimizer.step()
    assert not optimizer.state and same(values(model), before)
    fully_shard(average.module, mesh=whole_mesh())
    optimizer.step()
    torch.testing.assert_close(values(average.module), values(model), rtol=0, atol=0)


def a_step_that_only_makes_state():
    """By which torch.distributed.checkpoint fills an optimizer: neither averages nor policies take part."""
    model = network()
    optimizer = optim_ext.AdamW(model.parameters())
    average = swa_utils.AveragedModel(model)
    optimizer.average_into(average)
    policy = optimizer.set_grad_policy(max_norm=1.0)
    get_optimizer_state_dict(model, optimizer)
    assert len(optimizer.state) == len(list(model.parameters()))
    assert average.n_averaged == 0 and policy.last_norm is None
    backward(model, 0)
    optimizer.step()
    assert average.n_averaged == 1 and policy.last_norm > 0


CASES = [
    ddp, ddp_clips_in_the_step, zero, fsdp1, fsdp1_is_clipped_by_the_norm_of_a_group,
    fsdp1_norms_are_refused, fsdp2, fsdp2_checkpoints, a_loop_as_torchtitans, checkpoints_of_kept_state, fsdp2_compiled,
    fsdp2_finds_what_is_not_finite, fsdp2_averages, averages_of_parts_alone, averages_of_parts_that_are_replaced,
    averages_of_another_layout, an_average_that_is_not_cut_is_refused, a_step_that_only_makes_state,
]  # fmt: skip


if __name__ == "__main__":
    serve(CASES)
