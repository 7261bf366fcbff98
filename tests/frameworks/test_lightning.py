"""Lightning's Trainer, its CLI and Fabric."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from beside import (
    NEAR_IN_BFLOAT16,
    NEAR_IN_HALF,
    PACKAGES,
    Run,
    assert_alike,
    assert_resumed,
    assert_same,
    batches,
    both,
    four_ways,
    loss_of,
    network,
    values,
)
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from ranks import Worlds, cases_in
from torch import nn
from torch.utils.data import DataLoader

import optim_ext
from optim_ext import swa_utils

SHARDED = Path(__file__).with_name("lightning_cases.py")

# Options of a Trainer that prints and writes nothing.
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def loader():
    return DataLoader(batches(), batch_size=None)


class Classifier(L.LightningModule):
    """What LightningCLI gives an optimizer."""

    def __init__(self):
        super().__init__()
        self.network = network()
        self.losses = []

    def training_step(self, batch, index):
        loss = loss_of(self.network, batch)
        self.losses.append(loss.item())
        return loss


class WithOptimizer(Classifier):
    def __init__(self, package, name, options):
        super().__init__()
        self.chosen, self.options = getattr(package, name), options

    def configure_optimizers(self):
        optimizer = self.chosen(self.parameters(), **self.options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(package, name="AdamW", lr=0.02, epochs=2, save_to=None, resume_from=None, trainer=(), **options):
    module = WithOptimizer(package, name, {"lr": lr, **options})
    trainer = L.Trainer(**QUIET | {"max_epochs": epochs} | dict(trainer))
    trainer.fit(module, loader(), ckpt_path=resume_from)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return Run(module.losses, values(module.parameters()), trainer.optimizers[0])


def with_scaler():
    """Lightning makes 16-mixed bfloat16 on the CPU, but for a plugin of one's own."""
    return {"plugins": MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**20))}


@pytest.mark.parametrize(
    "name, options",
    [
        ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
        ("AdamW", {"amsgrad": True}),
        ("AdamW", {"fused": True}),
        ("RMSprop", {"lr": 0.005, "centered": True, "momentum": 0.5}),
        ("NAdam", {"lr": 0.01}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_losses_are_torchs(name, options):
    assert_alike(*both(fit, name, **options))


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search):
    """As many evaluations of the module as by torch's class. In double, as every decision of a search has to be the same."""
    doubled = {"precision": "64-true"}
    ours, theirs = both(fit, "LBFGS", lr=0.1, max_iter=4, line_search_fn=line_search, trainer=doubled)
    assert len(theirs.losses) > 2 * len(batches())
    assert_alike(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_options_of_the_trainer(options):
    assert_alike(*both(fit, trainer=options))


@pytest.mark.parametrize(
    "precision, tolerance",
    [pytest.param("bf16-mixed", NEAR_IN_HALF, id="mixed"), pytest.param("bf16-true", NEAR_IN_BFLOAT16, id="true")],
)
def test_bfloat16(precision, tolerance):
    assert_alike(*both(fit, trainer={"precision": precision}), tolerance)


@pytest.mark.parametrize("fused", [False, True])
def test_float16_with_a_scaler(fused):
    """The scale begins so high that the first steps are skipped."""
    ours, theirs = (fit(package, fused=fused, epochs=4, trainer=with_scaler()) for package in (optim_ext, torch.optim))
    assert_alike(ours, theirs, NEAR_IN_HALF)
    steps = [int(run.optimizer.state[p]["step"]) for run in (ours, theirs) for p in run.optimizer.state]
    assert len(set(steps)) == 1 and 0 < steps[0] < len(ours.losses)
    if fused:
        assert int(ours.optimizer.skipped_steps) == len(ours.losses) - steps[0]


def test_clipping_with_a_scaler_and_fused_steps():
    """Lightning refuses to clip for an optimizer that unscales in its step; the argument of the constructor clips there."""
    for package in PACKAGES.values():
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(package, fused=True, trainer=with_scaler() | {"gradient_clip_val": 0.5})
    sgd = {"name": "SGD", "lr": 0.5, "epochs": 4}
    clipped_by_lightning = fit(torch.optim, **sgd, trainer=with_scaler() | {"gradient_clip_val": 0.1})
    in_the_step = fit(optim_ext, **sgd, trainer=with_scaler(), fused=True, max_norm=0.1)
    assert_alike(in_the_step, clipped_by_lightning, NEAR_IN_HALF)


def test_the_constructors_norm_is_the_trainers_clip():
    assert_alike(fit(optim_ext, max_norm=0.5), fit(torch.optim, trainer={"gradient_clip_val": 0.5}))


def test_of_two_clips_the_smaller_wins():
    """The Trainer clips first, in place; the policy sees what is left."""
    ours = fit(optim_ext, max_norm=0.5, trainer={"gradient_clip_val": 0.1})
    assert_alike(ours, fit(torch.optim, trainer={"gradient_clip_val": 0.1}))
    assert float(ours.optimizer.last_norm) <= 0.1 * (1 + 1e-5)


@four_ways
def test_checkpoints(writer, reader, tmp_path):
    file = tmp_path / "saved.ckpt"
    fit(PACKAGES[writer], epochs=1, amsgrad=True, save_to=file)
    resumed = fit(PACKAGES[reader], epochs=2, amsgrad=True, resume_from=file)
    assert_resumed(resumed, fit(PACKAGES[reader], epochs=2, amsgrad=True), writer == reader)


@pytest.mark.parametrize(
    "callback",
    [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1)],
    ids=["EMA", "SWA"],
)
def test_averages_of_lightning(callback):
    """Lightning leaves the averages in the model."""
    ours, theirs = (fit(package, epochs=3, trainer={"callbacks": callback()}) for package in (optim_ext, torch.optim))
    assert_alike(ours, theirs)


class InTheStep(Callback):
    """The average of EMAWeightAveraging, taken in the pass of the step."""

    def on_train_start(self, trainer, module):
        self.average = swa_utils.AveragedModel(module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        module.optimizers().average_into(self.average)

    def on_train_end(self, trainer, module):
        self.average.copy_to(module)


def test_an_average_in_the_step_is_lightnings():
    ours = fit(optim_ext, trainer={"callbacks": InTheStep()})
    assert_alike(ours, fit(torch.optim, trainer={"callbacks": EMAWeightAveraging(decay=0.9)}))


def test_an_average_in_the_step_leaves_out_what_the_scaler_skips():
    averaging = InTheStep()
    ours = fit(optim_ext, fused=True, epochs=4, trainer=with_scaler() | {"callbacks": averaging})
    taken = len(ours.losses) - int(ours.optimizer.skipped_steps)
    assert 0 < taken < len(ours.losses) and int(averaging.average.n_averaged) == taken


def test_learning_rates_are_monitored(tmp_path):
    """The callback reads momentum and weight decay from the groups by the names in `defaults`."""
    seen = []
    for package in PACKAGES.values():
        logger = CSVLogger(tmp_path)
        watching = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
        fit(package, trainer={"logger": logger, "callbacks": watching, "log_every_n_steps": 1})
        seen.append(Path(logger.log_dir, "metrics.csv").read_text())
    assert seen[0] == seen[1]
    assert all(f"lr-AdamW{what}" in seen[0].splitlines()[0].split(",") for what in ("", "-momentum", "-weight_decay"))


class TwoByHand(L.LightningModule):
    """An encoder and a decoder, each with its optimizer, stepped by the module: one as it is, one by a closure."""

    def __init__(self, package, clip):
        super().__init__()
        self.automatic_optimization = False
        self.package, self.clip = package, clip
        torch.manual_seed(1)
        self.encoder, self.decoder = nn.Linear(12, 6), nn.Linear(6, 12)
        self.losses = []

    def configure_optimizers(self):
        return [self.package.Adam(self.encoder.parameters(), lr=0.02), self.package.SGD(self.decoder.parameters(), 0.1)]

    def loss(self, points):
        return (self.decoder(self.encoder(points)) - points).square().mean()

    def training_step(self, batch, index):
        of_encoder, of_decoder = self.optimizers()
        points, _ = batch
        self.toggle_optimizer(of_encoder)
        of_encoder.zero_grad()
        self.manual_backward(self.loss(points))
        self.clip(self, of_encoder)
        of_encoder.step()
        self.untoggle_optimizer(of_encoder)

        def closure():
            of_decoder.zero_grad()
            loss = self.loss(points)
            self.losses.append(loss.item())
            self.manual_backward(loss)

        with of_decoder.toggle_model():
            of_decoder.step(closure=closure)


CLIPS = {
    "by the module": lambda module, wrapper: module.clip_gradients(wrapper, 0.05, "norm"),
    "by the wrapper": lambda module, wrapper: wrapper.clip_grad_norm(0.05),
}


def train_two(package, clip):
    module = TwoByHand(package, clip)
    trainer = L.Trainer(**QUIET, max_epochs=3)
    trainer.fit(module, loader())
    return [Run(module.losses, values(module.parameters()), optimizer) for optimizer in trainer.optimizers]


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
def test_two_optimizers_by_hand(clip):
    theirs = train_two(torch.optim, CLIPS["by the module"])
    for ours, its in zip(train_two(optim_ext, clip), theirs, strict=True):
        assert_alike(ours, its)


def cli(*arguments):
    made = LightningCLI(
        Classifier,
        args=list(arguments),
        run=False,
        save_config_callback=None,
        trainer_defaults=QUIET | {"max_epochs": 2},
        seed_everything_default=0,
    )
    made.trainer.fit(made.model, loader())
    return Run(made.model.losses, values(made.model.parameters()), made.trainer.optimizers[0])


LR = "--optimizer.lr=0.02"


def test_the_cli_takes_the_full_name():
    assert_alike(cli("--optimizer=optim_ext.AdamW", LR), cli("--optimizer=torch.optim.AdamW", LR))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--optimizer=optim_ext.AdamW", LR, "--optimizer.max_norm=0.5"],
        ['--optimizer={"class_path": "optim_ext.AdamW", "init_args": {"lr": 0.02, "max_norm": 0.5}}'],
    ],
    ids=["options", "class_path"],
)
def test_the_cli_passes_the_options_of_the_constructor(arguments):
    ours = cli(*arguments)
    assert ours.optimizer.grad_policy.max_norm == 0.5
    assert_alike(ours, cli("--optimizer=torch.optim.AdamW", LR, "--trainer.gradient_clip_val=0.5"))


def in_a_process_of_its_own(argument):
    """Elsewhere other packages have optimizers of these names, too."""
    code = f"import torchvision_here; from beside import *; from test_lightning import *; assert_native(cli({argument!r}, LR).optimizer)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_cli_cannot_tell_two_classes_of_one_name():
    """Once optim_ext is imported."""
    done = in_a_process_of_its_own("--optimizer=AdamW")
    assert done.returncode == 2 and "Multiple subclasses with name AdamW" in done.stderr, done.stderr


def test_the_cli_finds_a_name_that_torch_lacks():
    done = in_a_process_of_its_own("--optimizer=Lion")
    assert done.returncode == 0, done.stderr


def test_patched_torch_in_the_cli():
    with optim_ext.patch_torch(allow_existing=True):
        patched = cli("--optimizer=torch.optim.AdamW", LR)
    assert type(patched.optimizer) is optim_ext.AdamW
    assert_same(patched, cli("--optimizer=optim_ext.AdamW", LR))


def fabric_run(package, clip=None, precision="32-true", steps=(0, 6), save_to=None, resume_from=None):
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    plain = network()
    model, optimizer = fabric.setup(plain, package.AdamW(plain.parameters(), lr=0.02))
    state, losses = {"model": model, "optimizer": optimizer}, []
    if resume_from is not None:
        fabric.load(resume_from, state)
    for batch in batches()[slice(*steps)]:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        fabric.backward(loss)
        if clip is not None:
            clip(fabric, model, optimizer)
        optimizer.step()
        losses.append(loss.item())
    if save_to is not None:
        fabric.save(save_to, state)
    return Run(losses, values(plain.parameters()), optimizer.optimizer)


FABRICS_CLIPS = {
    "by Fabric": lambda fabric, model, wrapper: fabric.clip_gradients(model, wrapper, max_norm=0.5),
    "by the wrapper": lambda fabric, model, wrapper: wrapper.clip_grad_norm(0.5),
}


@pytest.mark.parametrize("clip", FABRICS_CLIPS.values(), ids=FABRICS_CLIPS.keys())
def test_fabric(clip):
    assert_alike(fabric_run(optim_ext, clip), fabric_run(torch.optim, FABRICS_CLIPS["by Fabric"]))


def test_fabric_in_bfloat16():
    assert_alike(*both(fabric_run, precision="bf16-mixed"), NEAR_IN_HALF)


@four_ways
def test_checkpoints_of_fabric(writer, reader, tmp_path):
    file = tmp_path / "saved.ckpt"
    fabric_run(PACKAGES[writer], steps=(0, 3), save_to=file)
    resumed = fabric_run(PACKAGES[reader], steps=(3, 6), resume_from=file)
    assert_resumed(resumed, fabric_run(PACKAGES[reader]), writer == reader)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    worlds = Worlds(SHARDED, tmp_path_factory.mktemp("ranks"))
    yield worlds
    worlds.stop()


@pytest.mark.parametrize("case", cases_in(SHARDED))
def test_sharded(case, worlds):
    worlds.expect(2, case)
