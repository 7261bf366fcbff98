"""diffusers: a small denoising model, with the schedules and the average of its training scripts."""

import pytest
import torch
from beside import NEAR_IN_HALF, Run, assert_alike, assert_near, both, values
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

import optim_ext
from optim_ext import swa_utils

SIZES = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}


def train(package, steps=8, bfloat16=False, clip=None, prepare=None, **options):
    torch.manual_seed(7)
    model, noising = UNet2DModel(**SIZES), DDPMScheduler(num_train_timesteps=20)
    # With a larger eps than usual: what a bias of keys has for a gradient is rounding, which must not become a step.
    optimizer = package.AdamW(model.parameters(), lr=0.01, eps=1e-4, **options)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=steps)
    after = prepare(model, optimizer) if prepare else None
    numbers, losses = torch.Generator().manual_seed(8), []
    clean, noise = torch.randn(2, 4, 1, 8, 8, generator=numbers)
    times = torch.randint(20, (4,), generator=numbers)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            found = model(noising.add_noise(clean, noise, times), times).sample
        loss = torch.nn.functional.mse_loss(found.float(), noise)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if after is not None:
            after()
    return Run(losses, values(model.parameters()), optimizer)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"clip": 0.5}], ids=str)
def test_losses_are_torchs(options):
    assert_alike(*both(train, **options))


def test_bfloat16():
    assert_alike(*both(train, bfloat16=True), NEAR_IN_HALF)


def test_the_constructors_norm_is_the_scripts_clip():
    assert_alike(train(optim_ext, max_norm=0.5), train(torch.optim, clip=0.5))


def test_its_average_is_that_of_get_warmup_decay():
    """Which the step takes along."""
    averages = []

    def after_it(model, optimizer):
        average = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, inv_gamma=1.0, power=2 / 3)
        averages.append(average.shadow_params)
        return lambda: average.step(model.parameters())

    def in_the_step(model, optimizer):
        decay = swa_utils.get_warmup_decay(0.9, power=2 / 3)
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
        optimizer.average_into(average)
        averages.append(list(average.module.parameters()))

    theirs = train(torch.optim, prepare=after_it)
    for prepare in (after_it, in_the_step):
        assert_alike(train(optim_ext, prepare=prepare), theirs)
    assert_near(averages[1], averages[0])
    assert_near(averages[2], averages[0])
