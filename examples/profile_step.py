"""Train one step under torch.profiler and print where the optimizer spent it.

    python examples/profile_step.py --optimizer AdamW

Prints the profiler's table of the step, then what ran inside the optimizer: ``Optimizer.step#AdamW.step``, the range
torch puts around every ``step()``, and within it the one native call ``optim_ext::adamw_``. docs/profiling.md explains
how to read it. ``--trace FILE.json`` also writes the timeline, to be opened in Perfetto or chrome://tracing;
``--output FILE.png`` draws it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import optim_ext as optim

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "Adam": {},
    "AdamW": {},
    "RMSprop": {},
    "Adagrad": {},
}


def profile_one_step(name: str, device: torch.device) -> profile:
    """Train three steps of a small network with the optimizer called ``name``; the last one under the profiler."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 10))
    model.to(device)
    optimizer = getattr(optim, name)(model.parameters(), **OPTIMIZERS[name])
    images, labels = torch.randn(64, 256, device=device), torch.randint(10, (64,), device=device)

    def train_one_step() -> None:
        optimizer.zero_grad()
        with record_function("forward"):
            loss = nn.functional.cross_entropy(model(images), labels)
        with record_function("backward"):
            loss.backward()
        optimizer.step()

    for _ in range(2):  # makes the state
        train_one_step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as recorded:
        train_one_step()
    return recorded


def tree(event: Any, depth: int = 0) -> Iterator[str]:
    """One line per event: what ran inside a range, indented, with its time and the part not spent in its children."""
    name = "  " * depth + event.name
    yield f"{name:44s} {event.cpu_time_total:10.1f} us {event.self_cpu_time_total:10.1f} us"
    for child in event.cpu_children:
        yield from tree(child, depth + 1)


def draw(recorded: profile, path: Path) -> None:
    """What the host did in the step, as bars along time: the parts of the training step, and within the optimizer's the op."""
    figure, panel = plt.subplots(figsize=(8, 2.6), layout="constrained")
    rows = {"forward": 0, "backward": 0, "Optimizer.step": 0, "optim_ext::": 1}
    found = [(event, row) for event in recorded.events() for start, row in rows.items() if event.name.startswith(start)]
    begin = min(event.time_range.start for event, _ in found)
    for color, (event, row) in zip(("tab:gray", "tab:gray", "tab:blue", "tab:orange"), found, strict=False):
        start, length = (event.time_range.start - begin) / 1e3, event.time_range.elapsed_us() / 1e3
        panel.barh(row, length, left=start, color=color, edgecolor="white", height=0.5)
        panel.annotate(f"{event.name}\n{length:.2f} ms", (start, row + 0.3), fontsize=8, va="bottom")
    panel.set(yticks=[], ylim=(-0.5, 2.1), xlabel="ms since the training step began")
    panel.margins(x=0.12)
    panel.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="AdamW")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--trace", type=Path, help="also write the timeline to this file")
    parser.add_argument("--output", type=Path, help="also draw it into this file")
    options = parser.parse_args(arguments)
    recorded = profile_one_step(options.optimizer, options.device)
    print(recorded.key_averages().table(sort_by="cpu_time_total", row_limit=25, max_name_column_width=36))
    print(f"{'Inside the optimizer':44s} {'CPU total':>13s} {'CPU self':>13s}")
    for event in recorded.events():
        if event.name.startswith("Optimizer.step#"):
            print("\n".join(tree(event)))
    if options.trace is not None:
        recorded.export_chrome_trace(str(options.trace))
    if options.output is not None:
        draw(recorded, options.output)


if __name__ == "__main__":
    main()
