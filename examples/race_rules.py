"""Race the optimizers of examples/rules on scikit-learn's handwritten digits, beside AdamW.

    python examples/race_rules.py

All train the same small network from the same weights on the same batches. Prints the test accuracy of each, and saves the
loss curves as a picture. Exits with status 1 if one ends below 90 %, or does not step natively.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import optim_ext

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent / "rules"
REQUIRED_ACCURACY = 0.90
BATCH_SIZE, TEST = 64, 360
SMOOTHED = 23  # steps that a point of the curves is the mean of: an epoch
# Rates that suit this network; every other option is as it comes.
OPTIONS: dict[str, dict[str, Any]] = {
    "adabelief": {"lr": 3e-3},
    "adan": {"lr": 3e-3},
    "sophia_g": {"lr": 1e-3},
    "qhadam": {"lr": 3e-3},
    "tiger": {"lr": 3e-4},
    "signum": {"lr": 3e-4},
    "schedule_free_sgd": {"lr": 0.5},
    "cautious_adamw": {"lr": 3e-3},
    "adopt": {"lr": 3e-3},
    "mars": {"lr": 3e-3},
    "ademamix": {"lr": 1e-3},
    "grams": {"lr": 1e-3},
}


def load(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer that a file of examples/rules defines."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(v for v in vars(module).values() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer))


def train(made: Any, options: dict[str, Any], epochs: int) -> tuple[list[float], float, bool]:
    """The loss of each batch, the accuracy at the end, and whether every step was native."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32) / 16, torch.as_tensor(labels)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = made(model.parameters(), **options)
    losses = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x) - TEST).split(BATCH_SIZE):
            loss = cross_entropy(model(x[TEST:][batch]), y[TEST:][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    native = all(report.native for report in optim_ext.explain(optimizer))
    with torch.no_grad():
        accuracy = (model(x[:TEST]).argmax(1) == y[:TEST]).float().mean().item()
    return losses, accuracy, native


def draw(curves: dict[str, torch.Tensor], path: Path) -> None:
    """All curves; the legend names them from the highest to the lowest end, in which order they are seen at the right."""
    figure, axes = plt.subplots(figsize=(9.5, 5.5), layout="constrained")
    looks = {
        name: {"color": plt.cm.tab10(place % 10), "ls": ("-", "--", ":")[place // 10], "lw": 1.3}
        for place, name in enumerate(curves)
    }
    looks[next(iter(curves))] = {"color": "black", "lw": 2.8}
    for name in sorted(curves, key=lambda name: -float(curves[name][-1])):
        axes.plot(curves[name], label=name, **looks[name])
    axes.set(
        xlabel="step",
        ylabel=f"training loss, mean of {SMOOTHED} steps",
        yscale="log",
        title="Ten-line rules on 8 x 8 digits (test accuracy)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside center right", fontsize=9, handlelength=2.6, labelspacing=0.9)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("rules_race.png"))
    arguments = parser.parse_args()
    racers: dict[str, tuple[Any, dict[str, Any]]] = {"AdamW": (optim_ext.AdamW, {"lr": 3e-3})}
    for name, options in OPTIONS.items():
        made = load(name)
        racers[made.__name__] = (made, options)
    curves: dict[str, torch.Tensor] = {}
    failures = 0
    for name, (made, options) in tqdm(racers.items()):
        losses, accuracy, native = train(made, options, arguments.epochs)
        good = native and accuracy >= REQUIRED_ACCURACY
        failures += not good
        tqdm.write(f"{name:16} {accuracy:6.1%} {'native' if native else 'torch'} {'passed' if good else 'FAILED'}")
        curves[f"{name} ({accuracy:.1%})"] = torch.tensor(losses).unfold(0, SMOOTHED, 1).mean(1)
    draw(curves, arguments.output)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
