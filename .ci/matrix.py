"""Builds and tests this tree with several versions of torch and Python: ``python .ci/matrix.py [TORCH[/PYTHON]]...``.

    python .ci/matrix.py                     all of DEFAULT
    python .ci/matrix.py 2.12.1 2.14.1/3.13  torch 2.12.1 with the Python that runs this, torch 2.14.1 with Python 3.13
    python .ci/matrix.py --every 1           every test of the selection instead of one in 20

Each gets a new environment and a copy of the sources in build/matrix, one at a time, and both are removed after. A table of
what came out is printed, and written to build/matrix.json and build/matrix.md; what was said, to build/matrix-*.log. The exit
status is 1 where a build or a test failed. A torch or a Python that cannot be had here is no failure, and is told.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

from extra import needs_of

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/matrix"
# Every torch with the Python that runs this, every Python with the torch of `make test`.
DEFAULT = ["2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0", *(f"2.13.0/3.{minor}" for minor in range(10, 15))]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
BUILD_TOOLS = ["setuptools>=70.1", "ninja"]
# What depends on torch or Python. The C++ tests do on neither.
TESTS = ["tests/optim", "tests/lbfgs", "tests/ops", "tests/package", "--ignore=tests/package/test_objects.py"]
NOT_COPIED = shutil.ignore_patterns(
    *(
        "build",
        "dist",
        "*.so",
        "*.egg-info",
        "_build_info.py",
        "__pycache__",
        ".git",
        ".venv*",
        ".*_cache",
        ".hypothesis",
    )
)


class Unobtainable(Exception):
    """A torch or a Python that is not to be had on this machine."""


class Failed(Exception):
    """A command that a row cannot go on without."""


def find_python(version):
    """An interpreter with its headers: this one, one on the PATH, or one of pyenv's."""
    candidates = [sys.executable] if version == HERE else [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))
    ask = "import os, sys, sysconfig; print(*sys.version_info[:2], sep='.'); " + (
        "sys.exit(not os.path.exists(sysconfig.get_path('include') + '/Python.h'))"
    )
    without_headers = False
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "-c", ask], capture_output=True, text=True)
        if done.stdout.strip() == version:
            if done.returncode == 0:
                return candidate
            without_headers = True
    raise Unobtainable(f"Python {version} has no headers" if without_headers else f"no Python {version} is installed")


class Row:
    """One torch with one Python."""

    def __init__(self, name, every, workers):
        self.torch, _, python = name.partition("/")
        self.python, self.every, self.workers = python or HERE, every, workers
        self.result = {"torch": self.torch, "python": self.python}
        self.log = ROOT / f"build/matrix-{self.torch}-{self.python}.log"

    def run(self, what, *command, **environment):
        """Seconds that a command took; its output goes to the log."""
        print(f"{self.torch} with Python {self.python}: {what}", flush=True)
        start = time.monotonic()
        with self.log.open("a") as log:
            print(f"\n=== {what}", file=log, flush=True)
            status = subprocess.run(
                [str(word) for word in command],
                cwd=FOLDER / "tree",
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            ).returncode
        if status != 0:
            raise Failed(f"{what} failed")
        return round(time.monotonic() - start)

    def first_error(self):
        """What pip has said first of what it could not do."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("ERROR: ")]
        return lines[0].removeprefix("ERROR: ").partition(" (from versions")[0] if lines else "cannot be installed"

    def make(self):
        """Fills in the result, as far as it comes."""
        self.log.unlink(missing_ok=True)
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(parents=True)
        try:
            self.build_and_test()
        except Unobtainable as reason:
            self.result["not_obtainable"] = str(reason)
        except Failed as reason:
            self.result["fault"] = f"{reason}, see {self.log.relative_to(ROOT)}"
        finally:
            shutil.rmtree(FOLDER)

    def build_and_test(self):
        interpreter = find_python(self.python)
        shutil.copytree(ROOT, FOLDER / "tree", ignore=NOT_COPIED)
        self.run("making an environment", interpreter, "-m", "venv", FOLDER / "venv")
        python = FOLDER / "venv/bin/python"
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        try:
            self.run("installing torch", *pip, f"torch=={self.torch}", *BUILD_TOOLS)
        except Failed:
            raise Unobtainable(self.first_error()) from None
        self.run("installing what tests need", *pip, *needs_of("test"))
        build = [*pip, "--no-build-isolation", "--no-deps", "--verbose", "-e", "."]
        self.result["built_in_s"] = self.run("building", *build, OPTIM_EXT_CUDA="0")
        self.test(python)

    def test(self, python):
        report = FOLDER / "report.xml"
        # By its name: `-m pytest` would put the sources before the tests on the path.
        command = [python.with_name("pytest"), "-q", "-n", self.workers, f"--junitxml={report}", *TESTS]
        start = time.monotonic()
        try:
            self.run("testing", *command, OPTIM_EXT_SHARD=f"0/{self.every}")
        except Failed:
            self.count(report, went_well=False)
        else:
            self.count(report, went_well=True)
        self.result["tested_in_s"] = round(time.monotonic() - start)

    def count(self, report, went_well):
        """Takes passes and failures from a report of pytest."""
        cases = [*xml.etree.ElementTree.parse(report).iter("testcase")] if report.exists() else []
        failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        if len(failed) == 0 and not (went_well and cases):
            raise Failed("testing ended without a result")
        self.result["passed"] = len(cases) - len(failed)
        self.result["failed"] = [f"{case.get('classname')}::{case.get('name')}" for case in failed]

    def cells(self):
        result = self.result
        if "not_obtainable" in result:
            return [self.torch, self.python, "", "", "", result["not_obtainable"]]
        failed = len(result["failed"]) if "failed" in result else ""
        built, passed = result.get("built_in_s", ""), result.get("passed", "")
        return [self.torch, self.python, str(built), str(passed), str(failed), result.get("fault", "")]

    def is_good(self):
        return "not_obtainable" in self.result or ("fault" not in self.result and self.result["failed"] == [])


def table(rows):
    cells = [["torch", "Python", "built in s", "passed", "failed", "note"], *(row.cells() for row in rows)]
    lines = [f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=DEFAULT, metavar="TORCH[/PYTHON]")
    parser.add_argument("--every", type=int, default=20, metavar="N", help="run one of N tests (default: 20)")
    parser.add_argument("--workers", type=int, default=2, help="processes that test (default: 2)")
    told = parser.parse_args()
    # The default names a Python that is also the one that runs this.
    names = list(dict.fromkeys(name.removesuffix(f"/{HERE}") for name in told.versions))
    rows = []
    for name in names:
        rows.append(Row(name, told.every, told.workers))
        rows[-1].make()
        found = {
            "date": datetime.date.today().isoformat(),
            "machine": platform.platform(),
            "one_test_in": told.every,
            "rows": [row.result for row in rows],
        }
        (ROOT / "build/matrix.json").write_text(json.dumps(found, indent=1) + "\n")
        (ROOT / "build/matrix.md").write_text(table(rows))
        print(table(rows), flush=True)
    for row in rows:
        for test in row.result.get("failed", []):
            print(f"failed with torch {row.torch} and Python {row.python}: {test}")
    return 0 if all(row.is_good() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
