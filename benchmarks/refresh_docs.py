"""Measures anew what the documentation shows, and puts it there: docs/performance.md, its two pictures, README.md.

    python benchmarks/refresh_docs.py            # some 25 minutes on two quiet cores
    python benchmarks/refresh_docs.py --quick    # three rounds each, to try it out: not numbers to be kept

Runs step_time.py, averaging.py and one_pass.py one after the other. Pages are written once all three have succeeded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import report

HERE = Path(__file__).resolve().parent
PROGRAMS = ("step_time", "averaging", "one_pass")


def measure(program: str, results: Path, arguments: list[str]) -> str:
    """Runs a benchmark and returns what it printed before it named its files."""
    command = [sys.executable, str(HERE / f"{program}.py"), "--output-dir", str(results), *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return printed.split("Written:")[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds and no more")
    parser.add_argument("--results", type=Path, default=Path("bench_results"), help="folder for the JSON files")
    parser.add_argument("--into", type=Path, default=HERE.parent, help="the folder with README.md and docs")
    options = parser.parse_args()
    quick = ["--quick"] if options.quick else []
    tables = {program: measure(program, options.results, quick) for program in PROGRAMS}
    page, readme = options.into / "docs" / "performance.md", options.into / "README.md"
    report.refresh(options.results / "step_time.json", page, readme)
    for program in PROGRAMS[1:]:
        report.put_into(page, f"{tables[program]}\n", program)
    print(f"Written: {page}, {readme} and pictures. Compare what the pages say around the tables with the numbers.")


if __name__ == "__main__":
    main()
