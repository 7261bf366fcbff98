"""ignite: trainers, averages, schedules and checkpoints around an optimizer."""

import pytest
import torch
from beside import PACKAGES, Run, assert_alike, assert_near, assert_resumed, batches, both, four_ways, network, values
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, EMAHandler, LinearCyclicalScheduler
from torch import nn

import optim_ext
from optim_ext import swa_utils


def train(package, epochs=2, accumulate=1, attach=None, save_to=None, resume_from=None, **options):
    model = network()
    optimizer = package.AdamW(model.parameters(), lr=0.02, **options)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, gradient_accumulation_steps=accumulate
    )
    kept, losses = {"model": model, "optimizer": optimizer, "trainer": trainer}, []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    if attach is not None:
        attach(trainer, model, optimizer)
    if save_to is not None:
        saver = Checkpoint(kept, DiskSaver(save_to), global_step_transform=lambda *_: 1)
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), saver)
    if resume_from is not None:
        (file,) = resume_from.glob("*.pt")
        Checkpoint.load_objects(kept, torch.load(file))
    trainer.run(batches(), max_epochs=epochs)
    return Run(losses, values(model.parameters()), optimizer)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"accumulate": 2}], ids=str)
def test_losses_are_torchs(options):
    assert_alike(*both(train, **options))


def test_a_schedule_of_ignite():
    def attach(trainer, model, optimizer):
        schedule = LinearCyclicalScheduler(optimizer, "lr", 0.001, 0.02, cycle_size=6)
        trainer.add_event_handler(Events.ITERATION_STARTED, schedule)

    assert_alike(*both(train, attach=attach))


def test_averages():
    """ignite's momentum is one minus the decay, and its average begins as a copy of the first model."""
    averages = []

    def after_it(trainer, model, optimizer):
        handler = EMAHandler(model, momentum=0.1)
        handler.attach(trainer, event=Events.ITERATION_COMPLETED)
        averages.append(handler.ema_model)

    def in_the_step(trainer, model, optimizer):
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        average.update_parameters(model)
        optimizer.average_into(average)
        averages.append(average.module)

    for attach in (after_it, in_the_step):
        assert_alike(train(optim_ext, attach=attach), train(torch.optim, attach=after_it))
    assert_near(averages[0].parameters(), averages[1].parameters())
    assert_near(averages[2].parameters(), averages[3].parameters())


@four_ways
def test_checkpoints(writer, reader, tmp_path):
    train(PACKAGES[writer], save_to=tmp_path, amsgrad=True)
    resumed = train(PACKAGES[reader], resume_from=tmp_path, amsgrad=True)
    assert_resumed(resumed, train(PACKAGES[reader], amsgrad=True), writer == reader)
