"""accelerate: what prepare() makes of an optimizer and of its scheduler."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from beside import (
    NEAR_IN_HALF,
    PACKAGES,
    Run,
    assert_alike,
    assert_resumed,
    batches,
    both,
    four_ways,
    loss_of,
    network,
    samples,
    values,
)
from ranks import Worlds, cases_in
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import optim_ext
from optim_ext import swa_utils

SHARDED = Path(__file__).with_name("accelerate_cases.py")


@pytest.fixture(autouse=True)
def _its_own_accelerator():
    """accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(
    package, clip=None, mixed="no", accumulate=1, epochs=2, save_to=None, resume_from=None, prepare=None, **options
):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=mixed, gradient_accumulation_steps=accumulate)
    plain = network()
    optimizer = package.AdamW(plain.parameters(), **{"lr": 0.02} | options)
    if prepare is not None:
        prepare(plain, optimizer)
    model, optimizer, scheduler, loader = accelerator.prepare(
        plain, optimizer, StepLR(optimizer, 4, 0.5), DataLoader(TensorDataset(*samples()), 16)
    )
    if resume_from is not None:
        accelerator.load_state(resume_from)
    losses = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_of(model, batch)
                losses.append(loss.item())
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    if save_to is not None:
        accelerator.save_state(save_to)
    return Run(losses, values(plain.parameters()), optimizer.optimizer)


@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.5}, {"accumulate": 2, "clip": 0.5}, {"amsgrad": True}, {"fused": True}], ids=str
)
def test_losses_are_torchs(options):
    assert_alike(*both(train, **options))


def test_bfloat16():
    assert_alike(*both(train, mixed="bf16", clip=0.5), NEAR_IN_HALF)


def test_the_constructors_norm_is_accelerates_clip():
    assert_alike(train(optim_ext, max_norm=0.5), train(torch.optim, clip=0.5))


def test_controls_are_asked_for_before_prepare():
    """Its wrapper has none of them."""
    averages = []

    def prepare(model, optimizer):
        optimizer.set_grad_policy(max_norm=0.5)
        averages.append(swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)))
        optimizer.average_into(averages[0])

    ours = train(optim_ext, prepare=prepare)
    assert_alike(ours, train(torch.optim, clip=0.5))
    assert int(averages[0].n_averaged) == len(ours.losses)
    model = network()
    wrapper = AcceleratedOptimizer(optim_ext.AdamW(model.parameters()))
    assert not hasattr(wrapper, "clip_grad_norm") and hasattr(wrapper.optimizer, "clip_grad_norm")


@four_ways
def test_checkpoints(writer, reader, tmp_path):
    train(PACKAGES[writer], epochs=1, save_to=tmp_path)
    resumed = train(PACKAGES[reader], epochs=1, resume_from=tmp_path)
    assert_resumed(resumed, train(PACKAGES[reader], epochs=2), writer == reader)


def with_scaler(package, fused, in_words=None):
    """Losses, and per step the rate and whether accelerate saw it skipped. accelerate makes no GradScaler on the CPU: its
    wrappers are given one. The scale begins so high that steps are skipped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    model, losses, seen = network(), [], []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    optimizer = AcceleratedOptimizer(package.AdamW(model.parameters(), lr=0.02, fused=fused), scaler=scaler)
    schedule = StepLR(optimizer.optimizer, 1, 0.9)
    scheduler = AcceleratedScheduler(schedule, optimizer)
    for batch in batches() * 3:
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, batch)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        optimizer.step()
        if in_words is None:
            scheduler.step()
        elif not in_words(optimizer):
            schedule.step()
        seen.append((optimizer.step_was_skipped, optimizer.param_groups[0]["lr"]))
        optimizer.zero_grad()
    return Run(losses, values(model.parameters()), optimizer.optimizer), seen


def test_float16_and_the_steps_that_accelerate_sees_skipped():
    (ours, seen), (theirs, seen_of_theirs) = (with_scaler(package, False) for package in (optim_ext, torch.optim))
    assert_alike(ours, theirs, NEAR_IN_HALF)
    assert seen == seen_of_theirs and {skipped for skipped, _ in seen} == {False, True}


def test_of_fused_steps_accelerate_sees_none_skipped_and_the_line_to_write():
    (ours, seen), (theirs, seen_of_theirs) = (with_scaler(package, True) for package in (optim_ext, torch.optim))
    assert_alike(ours, theirs, NEAR_IN_HALF)
    assert seen == seen_of_theirs and {skipped for skipped, _ in seen} == {False}
    assert int(ours.optimizer.skipped_steps) > 0
    _, told = with_scaler(optim_ext, True, in_words=lambda optimizer: optimizer.optimizer.last_step_skipped)
    _, right = with_scaler(torch.optim, False)
    assert [rate for _, rate in told] == [rate for _, rate in right]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    worlds = Worlds(SHARDED, tmp_path_factory.mktemp("ranks"))
    yield worlds
    worlds.stop()


@pytest.mark.parametrize("case", cases_in(SHARDED))
def test_sharded(case, worlds):
    worlds.expect(2, case)
