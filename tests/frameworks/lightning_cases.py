"""What test_lightning.py runs on two processes: Lightning's ModelParallelStrategy, which leaves it to configure_model() to cut
a model by fully_shard. See ../ranks.py."""

import os
import sys
from pathlib import Path

import torchvision_here  # noqa: F401  (which Lightning imports)

# isort: split
import lightning as L
import torch
import torch.distributed as dist
from beside import PACKAGES, WAYS, Run, assert_alike, assert_resumed, batches, both, loss_of, network
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import serve
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import optim_ext

FOLDER = Path(sys.argv[3] if __name__ == "__main__" else ".")

ROWS = {"AdamW": {"lr": 0.02}, "SGD": {"lr": 0.05, "momentum": 0.9}}


class Sharded(L.LightningModule):
    def __init__(self, optimizer_class, options):
        super().__init__()
        self.network = network()
        self.optimizer_class, self.options = optimizer_class, options
        self.losses = []

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.network, mesh=mesh)

    def configure_optimizers(self):
        optimizer = self.optimizer_class(self.parameters(), **self.options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch, index):
        loss = loss_of(self.network, batch)
        self.losses.append(loss.item())
        return loss


def fit(package, name="AdamW", clip=0.5, epochs=4, save_to=None, resume_from=None, in_one_file=False, **options):
    """Every process has batches of its own. Lightning would deal them out anew in each epoch, and by another epoch's number
    in the first one of a run that is resumed."""
    share = batches()[dist.get_rank() :: dist.get_world_size()]
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), NODE_RANK="0")  # the processes are there
    module = Sharded(getattr(package, name), ROWS[name] | options)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=ModelParallelStrategy(
            data_parallel_size=dist.get_world_size(),
            tensor_parallel_size=1,
            save_distributed_checkpoint=not in_one_file,
        ),
        use_distributed_sampler=False,
        gradient_clip_val=clip,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(share, batch_size=None), ckpt_path=resume_from)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    params = list(module.parameters())
    assert all(isinstance(p, DTensor) for p in params)
    return Run(module.losses, [p.detach().full_tensor() for p in params], trainer.optimizers[0])


def trains_as_with_torchs_class():
    for name in ROWS:
        ours, theirs = both(fit, name)
        assert len(ours.losses) == 12
        assert_alike(ours, theirs)


def the_constructors_norm_is_the_trainers_clip():
    assert_alike(fit(optim_ext, clip=None, max_norm=0.5), fit(torch.optim))


def checkpoints():
    """In a folder to which each process writes its part, and in one file."""
    straight = {package: fit(PACKAGES[package]) for package in PACKAGES}
    for in_one_file in (False, True):
        for package in PACKAGES:
            fit(PACKAGES[package], epochs=2, save_to=FOLDER / f"{package} {in_one_file}", in_one_file=in_one_file)
        for writer, reader in WAYS:
            saved = FOLDER / f"{writer} {in_one_file}"
            resumed = fit(PACKAGES[reader], resume_from=saved, in_one_file=in_one_file)
            assert_resumed(resumed, straight[reader], writer == reader)


CASES = [trains_as_with_torchs_class, the_constructors_norm_is_the_trainers_clip, checkpoints]


if __name__ == "__main__":
    serve(CASES)
