"""The Trainer of transformers."""

import pytest
import torch
from beside import (
    NEAR_IN_HALF,
    PACKAGES,
    Run,
    assert_alike,
    assert_near,
    assert_resumed,
    assert_same,
    both,
    four_ways,
    values,
)
from language import llama, text
from transformers import Trainer, TrainerCallback, TrainingArguments

import optim_ext
from optim_ext import swa_utils


class Noting(Trainer):
    """Keeps the losses as they are: those it logs are rounded."""

    def __init__(self, **options):
        super().__init__(**options)
        self.losses = []

    def compute_loss(self, model, inputs, **options):
        loss = super().compute_loss(model, inputs, **options)
        self.losses.append(loss.item())
        return loss


def train(package, folder, name="AdamW", by_name=None, resume_from=None, callbacks=None, arguments=(), **options):
    """By `optimizer_cls_and_kwargs`, or by the class that the Trainer looks up under its own name for it."""
    usual = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    chosen = (getattr(package, name), {"lr": 0.01, **options})
    if by_name is not None:
        usual["optim"], chosen = by_name, None
    trainer = Noting(
        model=llama(),
        args=TrainingArguments(output_dir=str(folder), **usual | dict(arguments)),
        train_dataset=text(),
        optimizer_cls_and_kwargs=chosen,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return Run(trainer.losses, values(trainer.model.parameters()), trainer.optimizer.optimizer)


@pytest.mark.parametrize(
    "name, options",
    [("AdamW", {"weight_decay": 0.1}), ("AdamW", {"fused": True}), ("SGD", {"lr": 0.1, "momentum": 0.9})],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_losses_are_torchs(name, options, tmp_path):
    assert_alike(*both(train, tmp_path, name, **options))


@pytest.mark.parametrize(
    "arguments", [{"gradient_accumulation_steps": 2}, {"lr_scheduler_type": "cosine", "warmup_steps": 2}], ids=str
)
def test_options_of_the_trainer(arguments, tmp_path):
    assert_alike(*both(train, tmp_path, arguments=arguments))


def test_bfloat16(tmp_path):
    assert_alike(*both(train, tmp_path, arguments={"bf16": True}), NEAR_IN_HALF)


def test_the_constructors_norm_is_the_trainers_clip(tmp_path):
    """Which is 1.0 unless it is switched off."""
    ours = train(optim_ext, tmp_path, max_norm=1.0, arguments={"max_grad_norm": 0.0})
    theirs = train(torch.optim, tmp_path)
    assert_alike(ours, theirs)
    unclipped = train(torch.optim, tmp_path, arguments={"max_grad_norm": 0.0})
    assert not torch.equal(unclipped.params[0], theirs.params[0])


def test_of_two_clips_the_smaller_wins(tmp_path):
    smaller = {"max_grad_norm": 0.1}
    ours = train(optim_ext, tmp_path, max_norm=0.5, arguments=smaller)
    assert_alike(ours, train(torch.optim, tmp_path, arguments=smaller))
    assert float(ours.optimizer.last_norm) <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("by_name, fused", [("adamw_torch", None), ("adamw_torch_fused", True)])
def test_names_of_torchs_classes_where_torch_is_patched(by_name, fused, tmp_path):
    theirs = train(torch.optim, tmp_path, by_name=by_name)
    with optim_ext.patch_torch(allow_existing=True):
        ours = train(torch.optim, tmp_path, by_name=by_name)
    assert type(ours.optimizer) is optim_ext.AdamW and ours.optimizer.defaults["fused"] is fused
    assert_alike(ours, theirs)
    assert_same(ours, train(optim_ext, tmp_path, fused=fused, weight_decay=0.0))


@four_ways
def test_checkpoints(writer, reader, tmp_path):
    train(PACKAGES[writer], tmp_path, arguments={"save_strategy": "steps", "save_steps": 4})
    resumed = train(PACKAGES[reader], tmp_path / "on", resume_from=str(tmp_path / "checkpoint-4"))
    assert_resumed(resumed, train(PACKAGES[reader], tmp_path), writer == reader)


class InTheStep(TrainerCallback):
    """The Trainer's wrapper, which is accelerate's, has no average_into; what it wraps has."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **others):
        self.average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        optimizer.optimizer.average_into(self.average)


class AfterIt(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **others):
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        self.average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)

    def on_step_end(self, args, state, control, model=None, **others):
        self.average.update_parameters(model)


def test_an_average_in_the_step(tmp_path):
    ours, theirs = InTheStep(), AfterIt()
    assert_alike(train(optim_ext, tmp_path, callbacks=[ours]), train(torch.optim, tmp_path, callbacks=[theirs]))
    assert int(ours.average.n_averaged) == int(theirs.average.n_averaged) == 8
    assert_near(ours.average.module.parameters(), theirs.average.module.parameters())
