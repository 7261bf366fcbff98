"""Train a small convolutional network on handwritten digits, once with torch.optim and once with optim_ext.

Both runs start from the same weights and see the same batches in the same order. They advance side by side, one batch
each in turn, so that their optimizer steps are timed in pairs under the same load of the machine.

    python examples/train_digits.py --optimizer all

Prints, for every optimizer: the test accuracy of both, the largest difference between the two loss curves, the median
time of one ``optimizer.step()`` of optim_ext, the median ratio of torch's to it by pairs, and torch's as their product.
Saves the loss curves as a picture, over training steps and over the time spent in ``optimizer.step()``.
Exits with status 1 if an accuracy is below 97 %, the curves differ by more than ``LARGEST_DIFFERENCE``, or optim_ext
did not run its own kernels.

The data are the 1797 scanned digits (8 x 8 pixels) that scikit-learn ships; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import optim_ext

matplotlib.use("Agg")
from matplotlib import pyplot as plt

REQUIRED_ACCURACY = 0.97
# The two runs do the same arithmetic in another order of rounding, and training amplifies a last-bit difference by
# orders of magnitude. This bounds what is left of that; a wrong formula shows as a difference of 0.1 and more.
LARGEST_DIFFERENCE = 0.02
BATCH_SIZE = 64
SEED = 0

# Name on the command line -> class of torch.optim (and of optim_ext), options.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
    "adam": ("Adam", {"lr": 2e-3}),
    "amsgrad": ("Adam", {"lr": 2e-3, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 2e-3, "weight_decay": 1e-2}),
    "rmsprop": ("RMSprop", {"lr": 5e-4, "momentum": 0.5}),
    "adagrad": ("Adagrad", {"lr": 2e-2}),
}


class Digits(NamedTuple):
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(device: torch.device) -> Digits:
    """The data, a fifth of it for the test: images (n, 1, 8, 8) float32 in [0, 1], labels (n,) int64."""
    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=SEED
    )

    def as_images(array: Any) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32, device=device).div_(16).view(-1, 1, 8, 8)

    def as_labels(array: Any) -> Tensor:
        return torch.as_tensor(array, dtype=torch.int64, device=device)

    return Digits(as_images(train_images), as_labels(train_labels), as_images(test_images), as_labels(test_labels))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Run:
    """One model in training with the optimizers of one package (torch.optim or optim_ext)."""

    def __init__(self, package: Any, class_name: str, options: dict[str, Any], steps: int, device: torch.device):
        torch.manual_seed(SEED)
        self.model = network().to(device)
        self.optimizer = getattr(package, class_name)(self.model.parameters(), **options)
        self.scheduler = package.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self.device = device
        self.losses: list[float] = []
        self.step_seconds: list[float] = []

    def train_on(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(images), labels)
        loss.backward()
        self._wait()
        start = time.perf_counter()
        self.optimizer.step()
        self._wait()
        self.step_seconds.append(time.perf_counter() - start)
        self.scheduler.step()
        self.losses.append(loss.item())

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        self.model.eval()
        with torch.no_grad():
            return (self.model(images).argmax(1) == labels).double().mean().item()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Comparison(NamedTuple):
    name: str
    theirs: Run
    ours: Run
    accuracies: tuple[float, float]
    native: bool

    @property
    def differences(self) -> list[float]:
        return [abs(a - b) for a, b in zip(self.theirs.losses, self.ours.losses, strict=True)]

    @property
    def passed(self) -> bool:
        # Written so that a NaN loss does not pass.
        same_curves = all(d <= LARGEST_DIFFERENCE for d in self.differences)
        return min(self.accuracies) >= REQUIRED_ACCURACY and same_curves and self.native

    def __str__(self) -> str:
        their_times, our_times = (run.step_seconds[5:] or run.step_seconds for run in (self.theirs, self.ours))
        ratio = statistics.median(a / b for a, b in zip(their_times, our_times, strict=True))
        our_time = statistics.median(our_times)
        return (
            f"{self.name:9s}  {self.accuracies[0]:9.2%}  {self.accuracies[1]:9.2%}  {max(self.differences):14.2e}"
            f"  {ratio * our_time * 1e6:10.0f} us  {our_time * 1e6:10.0f} us"
            f"  {ratio:6.2f}x  {'passed' if self.passed else 'FAILED'}{'' if self.native else ' (not native)'}"
        )


HEADER = (
    "             test accuracy          largest loss    median time of one step       time\n"
    "optimizer      torch  optim_ext      difference          torch      optim_ext     ratio"
)


def compare(name: str, data: Digits, epochs: int, device: torch.device) -> Comparison:
    class_name, options = OPTIMIZERS[name]
    batches = len(data.train_labels) // BATCH_SIZE
    runs = [Run(package, class_name, options, epochs * batches, device) for package in (torch.optim, optim_ext)]
    shuffle = torch.Generator().manual_seed(SEED)
    progress = tqdm(total=epochs * batches, desc=f"{name:9s}", unit="batch", mininterval=0.5)
    with progress:
        for _ in range(epochs):
            order = torch.randperm(len(data.train_labels), generator=shuffle).to(device)
            for picked in order[: batches * BATCH_SIZE].view(batches, BATCH_SIZE):
                # Who goes first alternates, so that neither run always finds the caches as the other left them.
                for run in runs if progress.n % 2 == 0 else reversed(runs):
                    run.train_on(data.train_images[picked], data.train_labels[picked])
                progress.update()
            progress.set_postfix(loss=f"{runs[0].losses[-1]:.4f}", ours=f"{runs[1].losses[-1]:.4f}")
    theirs, ours = runs
    accuracies = tuple(run.accuracy(data.test_images, data.test_labels) for run in runs)
    native = all(group.native for group in optim_ext.explain(ours.optimizer))
    return Comparison(name, theirs, ours, accuracies, native)


def plot(comparisons: list[Comparison], path: Path) -> None:
    """Both loss curves of every comparison over steps, how far they are apart, and the curves over the time of the
    optimizers, which is where they differ."""
    columns = min(3, len(comparisons))
    rows = -(-len(comparisons) // columns)
    figure, axes = plt.subplots(
        3 * rows,
        columns,
        figsize=(5 * columns + 0.6, 6.6 * rows),
        height_ratios=[3, 1.2, 3] * rows,
        squeeze=False,
        layout="constrained",
    )
    for panel in axes.flat[:]:
        panel.set_visible(False)
    for index, comparison in enumerate(comparisons):
        row, column = divmod(index, columns)
        curves, apart, timed = (axes[3 * row + place][column] for place in range(3))
        for panel in (curves, apart, timed):
            panel.set_visible(True)
            panel.grid(alpha=0.3)
        curves.sharex(apart)
        curves.tick_params(labelbottom=False)
        styles = (
            (comparison.theirs, {"color": "tab:orange", "linewidth": 3.5, "alpha": 0.55, "label": "torch.optim"}),
            (comparison.ours, {"color": "tab:blue", "linewidth": 1, "label": "optim_ext"}),
        )
        for run, style in styles:
            curves.plot(run.losses, **style)
            timed.plot([1e3 * seconds for seconds in accumulate(run.step_seconds)], run.losses, **style)
        for panel in (curves, timed):
            panel.set_yscale("log")
            panel.legend(loc="upper right")
        timed.set_xlabel("ms spent in optimizer.step()")
        curves.set_title(f"{comparison.name}: test accuracy {comparison.accuracies[1]:.1%}")
        apart.plot(comparison.differences, color="dimgray", linewidth=1)
        apart.axhline(LARGEST_DIFFERENCE, color="tab:red", linewidth=1, linestyle="--")
        apart.set_yscale("symlog", linthresh=1e-7)
        apart.set_ylim(0, 100 * LARGEST_DIFFERENCE)  # room for the word above the bound
        apart.set_yticks([0, 1e-6, 1e-4, 1e-2])
        apart.set_xlabel("training step")
        if column == 0:
            curves.set_ylabel("training loss")
            timed.set_ylabel("training loss")
            apart.set_ylabel("difference")
            apart.annotate(
                f"bound {LARGEST_DIFFERENCE}",
                (0.02, 1.2 * LARGEST_DIFFERENCE),
                xycoords=("axes fraction", "data"),
                color="tab:red",
                va="bottom",
                fontsize="small",
            )
    together = " " if columns > 1 else "\n"
    figure.suptitle(f"Handwritten digits, trained from the same seed{together}with torch.optim and with optim_ext")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=[*OPTIMIZERS, "all"], default="all")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default), cuda, cuda:1")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("loss_curves.png"), help="where to save the picture")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")

    data = digits(options.device)
    names = list(OPTIMIZERS) if options.optimizer == "all" else [options.optimizer]
    print(f"torch {torch.__version__} on {options.device}, {torch.get_num_threads()} threads; {options.epochs} epochs")
    comparisons = [compare(name, data, options.epochs, options.device) for name in names]
    plot(comparisons, options.output)

    print()
    print(HEADER)
    for comparison in comparisons:
        print(comparison)
    print()
    print(f"Required: accuracy at least {REQUIRED_ACCURACY:.0%}, loss curves at most {LARGEST_DIFFERENCE} apart.")
    print("Time: optimizer.step() alone, torch.optim in its default mode; ratio: median of torch / optim_ext by pairs.")
    print(f"Loss curves: {options.output}")
    return 0 if all(comparison.passed for comparison in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
