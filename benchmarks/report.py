"""The cells that step_time.py measured, as Markdown tables and as a picture.

``python benchmarks/report.py FILE.json`` makes both again from a written file, and with ``--into docs/performance.md``
puts them into that page.
"""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Two ways of moving the same bytes at the memory limit differ by no more than this from run to run.
SAME_SPEED = 0.97

# What they stand between in a Markdown page.
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"

# Mode -> how its dot looks in the picture.
STYLES: dict[str, dict[str, Any]] = {
    "default": {"marker": "s", "color": "tab:orange", "label": "torch default"},
    "foreach": {"marker": "^", "color": "tab:green", "label": "torch foreach"},
    "fused": {"marker": "D", "color": "tab:red", "label": "torch fused"},
    "pytorch_optimizer": {"marker": "v", "color": "tab:brown", "label": "pytorch_optimizer"},
    "pytorch_optimizer loop": {"marker": "<", "color": "tab:olive", "label": "pytorch_optimizer, foreach=False"},
    "DeepSpeed": {"marker": "P", "color": "tab:purple", "label": "DeepSpeed"},
    "optim_ext": {"marker": "o", "color": "tab:blue", "label": "optim_ext", "zorder": 3},
    "memory limit": {"marker": "|", "color": "black", "label": "memory limit", "s": 260},
}


def heading(environment: dict[str, Any]) -> str:
    env = SimpleNamespace(**environment)
    return f"Date {env.date}, torch {env.torch}, {env.machine}, load {env.load_average_before:.1f} before"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent; a dash for what was not measured."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - max(1, whole))}f}"


def tables(cells: list[Any]) -> str:
    """One Markdown table per case. Times in ms; the last columns only where the memory limit was measured."""
    text = []
    for _, group in groupby(cells, key=lambda cell: cell.case):
        of_case = list(group)
        has_limit, has_cold = of_case[0].of_limit is not None, of_case[0].cold_ratio is not None
        modes = [mode for mode in STYLES if mode != "memory limit" and any(mode in cell.ms for cell in of_case)]
        columns = ["algorithm", *(STYLES[mode]["label"] for mode in modes), "ratio", "required", "extra MiB"]
        if has_limit:
            columns += ["GB/s", "limit GB/s", "of limit"]
        if has_cold:
            columns += ["cold caches", "ratio cold"]
        if of_case[0].launches:
            columns += ["host us", "host us of torch's best", "launches", "launches of torch's best"]
        columns += ["met"]
        text.append(f"\n### {of_case[0].case_title}\n")
        text.append("| " + " | ".join(columns) + " |")
        text.append("|" + "|".join([" --- "] + [" ---: "] * (len(columns) - 1)) + "|")
        for cell in of_case:
            row = [cell.algorithm_title]
            row += [number(cell.ms.get(mode)) + "*" * (mode in cell.wrong_modes) for mode in modes]
            row += [f"{cell.ratio:.2f}x", f"{cell.required_ratio:.1f}x", extra_memory(cell)]
            if has_limit:
                row += [number(cell.gb_moved / ms * 1e3) for ms in (cell.ms["optim_ext"], limit_ms(cell))]
                row += [f"{cell.of_limit:.0%}"]
            if has_cold:
                row += [number(cell.cold_ms["optim_ext"]), f"{cell.cold_ratio:.2f}x"]
            if cell.launches:
                pair = ("optim_ext", cell.best_torch_mode)
                row += [*(number(cell.host_us[mode]) for mode in pair), *(str(cell.launches[mode]) for mode in pair)]
            row += [VERDICTS[verdict(cell)]]
            text.append("| " + " | ".join(row) + " |")
        if any(cell.wrong_modes for cell in of_case):
            text.append("\n\\* computes a wrong result (found by comparison with torch's default mode): not counted.")
    return "\n".join(text) + "\n"


def limit_ms(cell: Any) -> float:
    """The memory loop's time, taken relative to ours by rounds; its own median may be of faster or slower rounds."""
    return cell.ms["optim_ext"] * cell.of_limit


VERDICTS = {"met": "yes", "at the limit": "no, at the limit", "missed": "**no**"}


def verdict(cell: Any) -> str:
    """Whether a cell is as required: "met", "at the limit" or "missed".

    At the limit: a smaller ratio than required, but at 90 % of the memory limit or above and not slower than torch, so
    there is no time left that any code could save.
    """
    if cell.met:
        return "met"
    slower_than_torch = min(cell.ratio, cell.cold_ratio or cell.ratio) < SAME_SPEED
    return "at the limit" if (cell.of_limit or 0.0) >= 0.9 and not slower_than_torch else "missed"


def extra_memory(cell: Any) -> str:
    """Ours, then that of torch's best mode."""
    ours, theirs = (cell.extra_mib.get(mode) for mode in ("optim_ext", cell.best_torch_mode))
    return f"{number(ours, 2)} / {number(theirs, 2)}"


def plot(cells: list[Any], environment: dict[str, Any], path: Path) -> None:
    """One panel per case: a dot for each mode's time, the memory limit as a bar, the ratio written at the right."""
    cases = [list(group) for _, group in groupby(cells, key=lambda cell: cell.case)]
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    tallest = max(len(of_case) for of_case in cases)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(5.6 * columns + 0.6, rows * (0.42 * tallest + 1.1) + 1.1),
        squeeze=False,
        layout="constrained",
    )
    for panel in axes.flat[len(cases) :]:
        panel.set_visible(False)
    shown: dict[str, Any] = {}
    for panel, of_case in zip(axes.flat, cases, strict=False):
        for y, cell in enumerate(of_case):
            times = [ms for mode, ms in cell.ms.items() if mode not in cell.wrong_modes]
            panel.plot([min(times), max(times)], [y, y], color="lightgray", zorder=1)
            for mode in cell.ms:
                ms = limit_ms(cell) if mode == "memory limit" else cell.ms[mode]
                if mode in cell.wrong_modes:
                    continue
                dot = panel.scatter(ms, y, **{"s": 48, "zorder": 2, **STYLES[mode]})
                shown.setdefault(mode, dot)
            panel.annotate(
                f"{cell.ratio:.2f}x" if cell.ratio < 10 else f"{cell.ratio:.1f}x",
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color={"met": "tab:green", "at the limit": "tab:olive", "missed": "tab:red"}[verdict(cell)],
            )
        panel.set_title(of_case[0].case_title)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_yticks(range(len(of_case)), [cell.algorithm_title.replace(", ", ",\n") for cell in of_case])
        panel.set_ylim(len(of_case) - 0.5, -0.5)
        panel.set_xlabel("ms per step (log scale)")
        panel.grid(axis="x", which="both", alpha=0.25)
    order = [mode for mode in STYLES if mode in shown]
    labels = [STYLES[mode]["label"] for mode in order]
    figure.legend([shown[mode] for mode in order], labels, loc="outside lower center", ncols=len(order))
    figure.suptitle(
        "Time of one optimizer step. At the right: torch's best mode / optim_ext "
        "(green as required, olive less but at the memory limit, red missed)\n"
        f"{environment['machine']}, torch {environment['torch']}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a step_time.json")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put tables and picture into this Markdown page")
    options = parser.parse_args()
    document = json.loads(options.file.read_text())
    environment = document["environment"]
    cells = [SimpleNamespace(**cell) for cell in document["cells"]]
    text = f"{heading(environment)}\n{tables(cells)}"
    if options.into is None:
        print(text)
        plot(cells, environment, options.file.with_suffix(".png"))
        return
    page = options.into.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    options.into.write_text(f"{before}{BEGIN}\n![time of a step](step_time.png)\n\n{text}\n{END}{after}")
    plot(cells, environment, options.into.with_name("step_time.png"))


if __name__ == "__main__":
    main()
