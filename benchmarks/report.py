"""The cells that step_time.py measured, as Markdown tables and as pictures.

``python benchmarks/report.py FILE.json`` makes both again from a written file; with ``--into docs/performance.md`` it puts
them into that page, and with ``--readme README.md`` the ratios into that one.
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
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

# Two ways of moving the same bytes at the memory limit differ by no more than this from run to run.
SAME_SPEED = 0.97

# What the README shows: columns and rows.
SMALL_CASES = ("gpt2", "resnet50", "small-mixed", "small-vectors")
SMALL_ALGORITHMS = ("sgd", "sgd-momentum", "adam", "adamw", "adagrad", "rmsprop", "adadelta", "nadam", "rprop")

# Mode -> how its dot looks in the picture.
STYLES: dict[str, dict[str, Any]] = {
    "default": {"marker": "s", "color": "tab:orange", "label": "torch default"},
    "foreach": {"marker": "^", "color": "tab:green", "label": "torch foreach"},
    "fused": {"marker": "D", "color": "tab:red", "label": "torch fused"},
    "compiled": {"marker": "*", "color": "tab:pink", "label": "torch compiled"},
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


OURS, LIMIT = "optim_ext", "memory limit"
TORCH_MODES, PEERS = (
    ("default", "foreach", "fused", "compiled"),
    ("pytorch_optimizer", "pytorch_optimizer loop", "DeepSpeed"),
)


def tables(cells: list[Any]) -> str:
    """One Markdown table per case. Times in ms; a column is there where one of the case's cells has something to say."""
    text = []
    for _, group in groupby(cells, key=lambda cell: cell.case):
        of_case = list(group)
        rows = [row_of(cell) for cell in of_case]
        columns = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
        text.append(f"\n### {of_case[0].case_title}\n")
        text.append("| " + " | ".join(columns) + " |")
        text.append("|" + "|".join([" --- "] + [" ---: "] * (len(columns) - 1)) + "|")
        text += ["| " + " | ".join(row[name] for name in columns) + " |" for row in rows]
        if any(cell.wrong_modes for cell in of_case):
            text.append("\n\\* computes a wrong result (found by comparison with torch's default mode): not counted.")
    return "\n".join(text) + "\n"


def row_of(cell: Any) -> dict[str, str]:
    """What a table says of a cell, by column."""
    row = {"algorithm": cell.algorithm_title}
    row |= {STYLES[mode]["label"]: time_of(cell, mode) for mode in TORCH_MODES}
    if cell.compile_s is not None:
        row[STYLES["compiled"]["label"]] += f" ({cell.compile_s:.0f} s to compile)"
    peers = sorted((mode for mode in PEERS if mode in cell.ms), key=lambda mode: cell.ms[mode])[:1]
    row["fastest other"] = "".join(f"{number(cell.ms[mode])} {STYLES[mode]['label']}" for mode in peers) or "-"
    row["optim_ext"] = time_of(cell, OURS)
    row["ratio"] = f"**{cell.ratio:.2f}x**"
    row["required"] = f"{cell.required_ratio:.1f}x, {VERDICTS[verdict(cell)]}"
    row["of limit"] = "-" if cell.of_limit is None else f"{cell.of_limit:.0%}"
    row["ratio cold"] = "-" if cell.cold_ratio is None else f"{cell.cold_ratio:.2f}x"
    for name, values in (("host us", cell.host_us), ("launches", cell.launches)):
        row[f"{name} (ours / torch's best)"] = (
            f"{number(values[OURS])} / {number(values[cell.best_torch_mode])}" if values else "-"
        )
    row["extra MiB (ours / torch's best)"] = extra_memory(cell)
    return row


def time_of(cell: Any, mode: str) -> str:
    return number(cell.ms.get(mode)) + "*" * (mode in cell.wrong_modes)


def ratios(cells: list[Any]) -> str:
    """The README's table: times as fast as the fastest of torch's modes."""
    by_place = {(cell.algorithm, cell.case): cell for cell in cells}
    titles = {cell.case: cell.case_title for cell in cells}
    cases = [case for case in SMALL_CASES if case in titles]
    lines = ["| | " + " | ".join(titles[case] for case in cases) + " |", "| --- |" + " ---: |" * len(cases)]
    for algorithm in SMALL_ALGORITHMS:
        row = [by_place.get((algorithm, case)) for case in cases]
        if any(row):
            title = next(cell.algorithm_title for cell in row if cell is not None)
            lines.append(f"| {title} | " + " | ".join("-" if c is None else number(c.ratio, 2) for c in row) + " |")
    return "\n".join(lines) + "\n"


VERDICTS = {"met": "met", "at the limit": "at the limit", "missed": "**missed**"}
COLOURS = {"met": "tab:green", "at the limit": "tab:olive", "missed": "tab:red"}


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
    cases = sorted((list(group) for _, group in groupby(cells, key=lambda cell: cell.case)), key=len, reverse=True)
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    tallest = [len(cases[row * columns]) for row in range(rows)]
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(5.6 * columns + 0.6, 0.42 * sum(tallest) + 1.1 * rows + 1.1),
        height_ratios=[0.42 * lines + 1.1 for lines in tallest],
        squeeze=False,
        layout="constrained",
    )
    for panel in axes.flat[len(cases) :]:
        panel.set_visible(False)
    shown: dict[str, Any] = {}
    for index, (panel, of_case) in enumerate(zip(axes.flat, cases, strict=False)):
        for y, cell in enumerate(of_case):
            times = [ms for mode, ms in cell.ms.items() if mode not in cell.wrong_modes]
            panel.plot([min(times), max(times)], [y, y], color="lightgray", zorder=1)
            for mode in cell.ms:
                if mode in cell.wrong_modes:
                    continue
                dot = panel.scatter(cell.ms[mode], y, **{"s": 48, "zorder": 2, **STYLES[mode]})
                shown.setdefault(mode, dot)
            panel.annotate(
                f"{cell.ratio:.2f}x" if cell.ratio < 10 else f"{cell.ratio:.1f}x",
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color=COLOURS[verdict(cell)],
            )
        panel.set_title(of_case[0].case_title)
        panel.set_xscale("log")
        least, most = panel.get_xlim()
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 200 * least else (1,)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_yticks(range(len(of_case)), [cell.algorithm_title.replace(", ", ",\n") for cell in of_case])
        panel.set_ylim(tallest[index // columns] - 0.5, -0.5)
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


def plot_small(cells: list[Any], environment: dict[str, Any], path: Path) -> None:
    """For the README, where a picture is half as wide as it is here: a bar for each ratio, on the same scale everywhere."""
    by_place = {(cell.case, cell.algorithm): cell for cell in cells}
    cases = [[by_place.get((case, algorithm)) for algorithm in SMALL_ALGORITHMS] for case in SMALL_CASES]
    cases = [[cell for cell in of_case if cell is not None] for of_case in cases]
    cases = [of_case for of_case in cases if of_case] or [list(cells)]
    rows = -(-len(cases) // 2)
    figure, axes = plt.subplots(
        rows, min(2, len(cases)), figsize=(8.4, 0.8 + 3.5 * rows), squeeze=False, sharex=True, layout="constrained"
    )
    largest = max(cell.ratio for of_case in cases for cell in of_case)
    for panel in axes.flat[len(cases) :]:
        panel.set_visible(False)
    for panel, of_case in zip(axes.flat, cases, strict=False):
        for y, cell in enumerate(of_case):
            panel.barh(y, cell.ratio - 1.0, left=1.0, color="tab:blue" if cell.ratio >= SAME_SPEED else "tab:red")
            text = f"{number(cell.ratio, 2)}x"
            panel.annotate(
                text, (max(1.0, cell.ratio), y), (4, 0), textcoords="offset points", va="center", fontsize=12
            )
        panel.axvline(1.0, color="black", linewidth=1)
        panel.set_title(of_case[0].case_title, fontsize=14)
        panel.set_xscale("log")
        panel.set_xlim(0.7, 2.2 * largest)
        panel.xaxis.set_major_locator(FixedLocator([1, 3, 10, 30, 100]))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_yticks(range(len(of_case)), [cell.algorithm_title for cell in of_case])
        panel.set_ylim(len(of_case) - 0.4, -0.6)
        panel.tick_params(labelsize=12)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"One optimizer step: times as fast as the fastest mode of torch {environment['torch'].split('+')[0]}",
        fontsize=15,
    )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def put_into(page: Path, text: str, what: str = "measured") -> None:
    """Replaces what stands between two marks of a page, which name what it is."""
    begin, end = f"<!-- {what} -->", f"<!-- end of {what} -->"
    before, after = page.read_text().split(begin)[0], page.read_text().split(end)[1]
    page.write_text(f"{before}{begin}\n{text}{end}{after}")


def refresh(file: Path, page: Path, readme: Path | None = None) -> None:
    """Puts the tables and pictures of a step_time.json into a page, and the ratios into the README."""
    environment, cells = read(file)
    put_into(page, f"![time of a step](step_time.png)\n\n{heading(environment)}\n{tables(cells)}\n")
    plot(cells, environment, page.with_name("step_time.png"))
    plot_small(cells, environment, page.with_name("step_time_small.png"))
    if readme is not None:
        put_into(readme, ratios(cells))


def read(file: Path) -> tuple[dict[str, Any], list[Any]]:
    document = json.loads(file.read_text())
    return document["environment"], [SimpleNamespace(**cell) for cell in document["cells"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a step_time.json")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put tables and picture into this Markdown page")
    parser.add_argument("--readme", type=Path, metavar="PAGE", help="with --into: put the ratios into this one")
    options = parser.parse_args()
    if options.into is not None:
        refresh(options.file, options.into, options.readme)
        return
    environment, cells = read(options.file)
    print(f"{heading(environment)}\n{tables(cells)}")
    plot(cells, environment, options.file.with_suffix(".png"))
    plot_small(cells, environment, options.file.with_name(options.file.stem + "_small.png"))


if __name__ == "__main__":
    main()
