"""What test_accelerate.py runs on two processes: accelerate's plugin for FSDP2. See ../ranks.py."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, fsdp2_prepare_model
from beside import (
    NEAR_IN_HALF,
    PACKAGES,
    WAYS,
    Run,
    assert_alike,
    assert_near,
    assert_resumed,
    both,
    loss_of,
    network,
    samples,
)
from ranks import serve
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import optim_ext

FOLDER = Path(sys.argv[3] if __name__ == "__main__" else ".")

ROWS = {"AdamW": {"lr": 0.02}, "SGD": {"lr": 0.05, "momentum": 0.9}}


def accelerator_of(mixed="no", distributed_type=DistributedType.MULTI_GPU):
    """An Accelerator that is given the plugin. accelerate looks at it only where the processes have GPUs or their like, and
    has to be told that they do; what it does then it does on the CPU."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState(cpu=True).distributed_type = distributed_type
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=50)
    return Accelerator(cpu=True, mixed_precision=mixed, fsdp_plugin=plugin)


def train(
    package, name="AdamW", clip=0.5, mixed="no", epochs=4, average=None, save_to=None, resume_from=None, **options
):
    accelerator = accelerator_of(mixed)
    plain = network()
    optimizer = getattr(package, name)(plain.parameters(), **ROWS[name] | options)
    if average is not None:
        average.begin(plain, optimizer)
    model, optimizer, scheduler, loader = accelerator.prepare(
        plain, optimizer, StepLR(optimizer, 4, 0.5), DataLoader(TensorDataset(*samples()), 16)
    )
    assert all(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
    if average is not None:
        fsdp2_prepare_model(accelerator, average.average.module)
    if resume_from is not None:
        accelerator.load_state(resume_from)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            loss = loss_of(model, batch)
            losses.append(loss.item())
            accelerator.backward(loss)
            if clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if average is not None:
                average.after_step(model)
    if save_to is not None:
        accelerator.save_state(save_to)
    return Run(losses, wholes(model), optimizer.optimizer)


def wholes(model):
    return [p.detach().full_tensor() for p in model.parameters()]


def without_gpus_it_is_left_out():
    """The others would else test DistributedDataParallel."""
    accelerator = accelerator_of(distributed_type=DistributedType.MULTI_CPU)
    assert not accelerator.is_fsdp2
    model = network()
    model, _ = accelerator.prepare(model, optim_ext.AdamW(model.parameters()))
    assert isinstance(model, DistributedDataParallel)
    assert accelerator_of().is_fsdp2


def trains_as_with_torchs_class():
    for name in ROWS:
        assert_alike(*both(train, name))


def bfloat16():
    assert_alike(*both(train, mixed="bf16"), NEAR_IN_HALF)


def the_constructors_norm_is_accelerates_clip():
    assert_alike(train(optim_ext, clip=None, max_norm=0.5), train(torch.optim))


class Average:
    """A moving average of the whole model, made before prepare() as FSDP copies none, and cut after it as the model is."""

    def __init__(self, package):
        self.package = package.swa_utils

    def begin(self, model, optimizer):
        self.average = self.package.AveragedModel(model, multi_avg_fn=self.package.get_ema_multi_avg_fn(0.9))
        self.in_step = self.package is optim_ext.swa_utils
        if self.in_step:
            optimizer.average_into(self.average)

    def after_step(self, model):
        if not self.in_step:
            self.average.update_parameters(model)


def an_average_in_the_step_is_cut_as_the_model():
    ours, theirs = Average(optim_ext), Average(torch.optim)
    assert_alike(train(optim_ext, average=ours), train(torch.optim, average=theirs))
    assert_near(wholes(ours.average.module), wholes(theirs.average.module))
    assert ours.average.n_averaged == theirs.average.n_averaged == 12


def checkpoints():
    straight = {package: train(PACKAGES[package]) for package in PACKAGES}
    for package in PACKAGES:
        train(PACKAGES[package], epochs=2, save_to=FOLDER / package)
    for writer, reader in WAYS:
        resumed = train(PACKAGES[reader], epochs=2, resume_from=FOLDER / writer)
        assert_resumed(resumed, straight[reader], writer == reader)


CASES = [
    without_gpus_it_is_left_out, trains_as_with_torchs_class, bfloat16, the_constructors_norm_is_accelerates_clip,
    an_average_in_the_step_is_cut_as_the_model, checkpoints,
]  # fmt: skip


if __name__ == "__main__":
    serve(CASES)
