"""Stochastic weight averaging on handwritten digits: the classic recipe, saved at every epoch and resumed in the middle.

    python examples/swa_digits.py

SGD with a cosine schedule brings the network close; then ``SWALR`` holds a high learning rate, so that the weights keep
moving around the optimum, and ``AveragedModel`` takes their mean, once per epoch. ``update_bn`` makes the batch norms'
statistics fit the averaged weights. A checkpoint is written after every epoch. At the end a new process' worth of
objects is made, the checkpoint of the middle is loaded into them, and the rest is trained again.

Prints the test accuracy of the last weights and of the average, saves the curves of both as a picture, and exits with
status 1 if the resumed training does not end in the very same weights or the average is not as accurate as required.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from train_digits import BATCH_SIZE, REQUIRED_ACCURACY, SEED, Digits, digits, network

import optim_ext
from optim_ext.swa_utils import SWALR, AveragedModel, update_bn

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator


class Training:
    """Model, average, optimizer and schedules of one run, and everything a checkpoint has to hold."""

    def __init__(self, data: Digits, epochs: int):
        torch.manual_seed(SEED)
        self.data = data
        self.averages_from = epochs // 2  # the first epoch after which the weights are averaged
        self.model = network().to(data.train_images.device)
        self.averaged = AveragedModel(self.model)
        self.optimizer = optim_ext.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.schedule = optim_ext.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=epochs)
        self.swa_schedule = SWALR(self.optimizer, swa_lr=0.1, anneal_epochs=2)
        self.shuffle = torch.Generator().manual_seed(SEED)
        self.epoch = 0
        self.accuracies: dict[str, list[tuple[int, float]]] = {"last weights": [], "averaged weights": []}

    def run_epoch(self) -> None:
        self.model.train()
        for images, labels in self._batches():
            self.optimizer.zero_grad()
            cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()
        if self.epoch < self.averages_from:
            self.schedule.step()
        else:
            self.swa_schedule.step()
            self.averaged.update_parameters(self.model)
        self.epoch += 1
        self._record("last weights", self.model)
        if self.averaged.n_averaged > 0:
            update_bn((images for images, _ in self._batches(shuffled=False)), self.averaged)
            self._record("averaged weights", self.averaged)

    def save(self, path: Path) -> None:
        torch.save({name: part.state_dict() for name, part in self._parts().items()} | self._rest(), path)

    def load(self, path: Path) -> None:
        checkpoint = torch.load(path)
        for name, part in self._parts().items():
            part.load_state_dict(checkpoint[name])
        self.epoch, self.accuracies = checkpoint["epoch"], checkpoint["accuracies"]
        self.shuffle.set_state(checkpoint["shuffle"])

    def _parts(self) -> dict[str, Any]:
        names = ("model", "averaged", "optimizer", "schedule", "swa_schedule")
        return {name: getattr(self, name) for name in names}

    def _rest(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "accuracies": self.accuracies, "shuffle": self.shuffle.get_state()}

    def _batches(self, shuffled: bool = True) -> list[tuple[Tensor, Tensor]]:
        count = len(self.data.train_labels)
        order = torch.randperm(count, generator=self.shuffle) if shuffled else torch.arange(count)
        picks = order[: count // BATCH_SIZE * BATCH_SIZE].view(-1, BATCH_SIZE).to(self.data.train_labels.device)
        return [(self.data.train_images[pick], self.data.train_labels[pick]) for pick in picks]

    def _record(self, name: str, model: nn.Module) -> None:
        model.eval()
        with torch.no_grad():
            right = model(self.data.test_images).argmax(1) == self.data.test_labels
        self.accuracies[name].append((self.epoch, right.double().mean().item()))


def plot(training: Training, path: Path) -> None:
    figure, panel = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, points), colour in zip(training.accuracies.items(), ("tab:orange", "tab:blue"), strict=True):
        epochs, accuracies = zip(*points, strict=True)
        panel.plot(epochs, [100 * (1 - a) for a in accuracies], marker=".", color=colour, label=name)
    panel.axvline(training.averages_from + 0.5, color="gray", linewidth=1, linestyle="--", label="averaging begins")
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("epoch")
    panel.set_ylabel("test error (%)")
    panel.set_title("Handwritten digits: SGD, and the mean of its weights")
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default), cuda, cuda:1")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("swa_curves.png"), help="where to save the picture")
    options = parser.parse_args(arguments)
    if options.epochs < 4:
        parser.error("--epochs must be at least 4")

    data = digits(options.device)
    with TemporaryDirectory() as folder:
        training = Training(data, options.epochs)
        for epoch in tqdm(range(options.epochs), desc="training", unit="epoch"):
            training.run_epoch()
            training.save(Path(folder, f"{epoch + 1}.pt"))
        middle = options.epochs * 3 // 4  # some models are averaged already
        resumed = Training(data, options.epochs)
        resumed.load(Path(folder, f"{middle}.pt"))
        for _ in tqdm(range(middle, options.epochs), desc="resumed", unit="epoch"):
            resumed.run_epoch()
    plot(training, options.output)

    first, again = ([*t.model.state_dict().values(), *t.averaged.state_dict().values()] for t in (training, resumed))
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    last, average = (points[-1][1] for points in training.accuracies.values())
    print(f"\ntorch {torch.__version__} on {options.device}, {options.epochs} epochs")
    print(f"last weights      {last:7.2%}")
    print(f"averaged weights  {average:7.2%}  (mean of {int(training.averaged.n_averaged)} epochs)")
    print(f"resumed after epoch {middle}: {'the same weights, bit for bit' if same else 'OTHER WEIGHTS'}")
    print(f"Required of the average: {REQUIRED_ACCURACY:.0%}. Curves: {options.output}")
    return 0 if same and average >= REQUIRED_ACCURACY else 1


if __name__ == "__main__":
    sys.exit(main())
