"""What benchmarks/gpu.sh found, as a page: ``python benchmarks/gpu_page.py RESULTS PAGE``. Takes what is there of logs and
tables; what is missing is named, with the end of its log. Needs neither a GPU nor optim_ext nor torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LINES_OF_A_FAILURE = 12
# What a GPU is to show (docs/gpu.md), and the cell that shows it: a case and an algorithm of step_time.py.
OF_COPY_BANDWIDTH, MOST_HOST_US, LBFGS_RATIO = 0.85, 100.0, 10.0


def read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def cell_of(step_time: Any, case: str, algorithm: str) -> Any:
    cells = step_time["cells"] if step_time else []
    found = [cell for cell in cells if (cell["case"], cell["algorithm"]) == (case, algorithm)]
    return SimpleNamespace(**found[0]) if found else None


def goals(step_time: Any, lbfgs: Any) -> list[str]:
    """The goals, what was measured of each, and whether it is met."""
    rows = ["| goal | measured | |", "| --- | --- | --- |"]

    def add(goal: str, measured: str | None, met: bool) -> None:
        rows.append(
            f"| {goal} | {measured or 'not measured'} | {('met' if met else '**missed**') if measured else ''} |"
        )

    for case, title in (("gpt2", "124M"), ("billion", "1.3B")):
        cell = cell_of(step_time, case, "adamw")
        add(
            f"AdamW float32, {title}: {OF_COPY_BANDWIDTH:.0%} of copy bandwidth",
            cell and cell.of_limit and f"{cell.of_limit:.0%}",
            bool(cell and cell.of_limit and cell.of_limit >= OF_COPY_BANDWIDTH),
        )
        add(
            f"AdamW float32, {title}: at least as fast as torch's fastest mode",
            cell and f"{cell.ratio:.2f}x ({cell.best_torch_mode})",
            bool(cell and cell.ratio >= 1.0),
        )
    cell = cell_of(step_time, "small-vectors", "adamw")
    host = cell and cell.host_us.get("optim_ext")
    launches = cell and cell.launches.get("optim_ext")
    add("1000 small tensors: one launch", launches and f"{launches}", launches == 1)
    add(
        f"1000 small tensors: at most {MOST_HOST_US:.0f} us of the host",
        host and f"{host:.0f} us",
        (host or 1e9) <= MOST_HOST_US,
    )
    rows_of = {row["case"]: row for row in (lbfgs or {"rows": []})["rows"]}
    row = rows_of.get("100k")
    add(
        "L-BFGS, n = 100,000, m = 100: 10 times torch",
        row and f"{row['ratio']:.1f}x",
        bool(row and row["ratio"] >= LBFGS_RATIO),
    )
    return rows


def parts(results: Path) -> list[str]:
    """How each part ended; of those that did not pass, the end of the log."""
    rows, failures = ["| part | seconds | |", "| --- | ---: | --- |"], []
    steps = results / "steps.txt"
    for line in steps.read_text().splitlines() if steps.exists() else []:
        name, seconds, end = line.split("\t")
        rows.append(f"| {name} | {seconds} | {end} |")
        log = results / f"{name}.log"
        if end != "passed" and log.exists():
            tail = log.read_text(errors="replace").splitlines()[-LINES_OF_A_FAILURE:]
            failures += ["", f"The end of {name}:", "", "```", *tail, "```"]
    return rows + failures


def log_of(results: Path, name: str) -> list[str]:
    log = results / f"{name}.log"
    return ["```", *log.read_text(errors="replace").splitlines(), "```"] if log.exists() else ["Not measured."]


def page(results: Path) -> str:
    step_time, lbfgs = read(results / "step_time.json"), read(results / "lbfgs.json")
    environment = (step_time or {}).get("environment", {})
    head = "Nothing was measured." if not environment else (
        f"{environment['date']}, {environment['machine']}, torch {environment['torch']}, Python {environment['python']}."
    )  # fmt: skip
    lines = ["# Performance on a GPU", "", f"Written by `benchmarks/gpu.sh`. {head}", "", "## Goals", ""]
    lines += [*goals(step_time, lbfgs), "", "## What ran", "", *parts(results), "", "## Time of a step", ""]
    if step_time:
        import report  # which needs matplotlib

        cells = [SimpleNamespace(**cell) for cell in step_time["cells"]]
        lines += ["[performance.md](performance.md) explains the columns; the memory limit is a copy on the GPU."]
        lines += [report.tables(cells)]
        bandwidths = {cell.case_title: cell.gb_moved / cell.ms["memory limit"] * 1e3 for cell in cells if cell.gb_moved}
        lines += ["Copy bandwidth: " + ", ".join(f"{gb:.0f} GB/s ({title})" for title, gb in bandwidths.items()) + "."]
    else:
        lines += ["Not measured."]
    lines += ["", "## Clipping, step and average in one pass", "", *log_of(results, "one-pass")]
    lines += ["", "## L-BFGS", "", *log_of(results, "lbfgs"), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(page(Path(sys.argv[1])))
