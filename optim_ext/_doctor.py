"""``python -m optim_ext doctor [--json]``: the report, the self-test, and what to mend.

It also runs where the native module does not, and says why: nothing here may need it when it is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

USAGE = "usage: python -m optim_ext doctor [--json]"


class Finding(NamedTuple):
    """Something to mend. A ``fault`` keeps optim_ext from running, or makes it wrong; ``advice`` costs speed or a feature."""

    kind: Literal["fault", "advice"]
    about: str
    found: str
    do: str

    def __str__(self) -> str:
        return f"{self.kind:9} {self.about}: {self.found}; {self.do}"


def main(arguments: list[str], problem: ImportError | None = None) -> int:
    """Print the report and the findings.

    Args:
        arguments: none, or ``--json``.
        problem: why optim_ext cannot be imported.

    Returns:
        The exit status: 1 where there is a fault, 2 where the arguments are not understood, else 0.
    """
    if arguments not in ([], ["--json"]):
        print(USAGE, file=sys.stderr)
        return 2
    as_json = arguments == ["--json"]
    say: Callable[[str], None] = (lambda line: None) if as_json else print
    build = _build_record()
    findings = list(_findings(build, problem))
    report: dict[str, Any] = {"torch": str(torch.__version__), "build": build}
    tested = []
    if problem is None:
        from optim_ext import _report

        report = _report.facts()
        for line in _report.lines(report):
            say(line)
        for test in _report.self_test():
            say(str(test))
            tested.append(test)
        findings += [
            Finding("fault", "self-test", str(test), "report it, with this output") for test in tested if not test.good
        ]
    for finding in findings:
        say(str(finding))
    faults = sum(finding.kind == "fault" for finding in findings)
    say(f"doctor    {faults} faults, {len(findings) - faults} pieces of advice")
    if as_json:
        everything = {
            "ok": faults == 0,
            "findings": [finding._asdict() for finding in findings],
            "report": report,
            "self_test": [test._asdict() for test in tested],
        }
        print(json.dumps(everything, indent=2))
    return int(faults > 0)


def _build_record() -> dict[str, Any]:
    try:
        from optim_ext._build_info import BUILD_INFO
    except ImportError:
        return {}
    return dict(BUILD_INFO)


def _findings(build: dict[str, Any], problem: ImportError | None) -> Iterator[Finding]:
    if problem is not None:
        yield Finding("fault", "import", str(problem), "nothing native runs before")
    yield from _about_torch(build, str(torch.__version__), _installed_at("torch"))
    yield from _about_gpus(build)
    yield from _about_threads(torch.get_num_threads(), usable_cores(), os.environ)
    if problem is None:
        yield from _about_rules()


def _about_torch(build: dict[str, Any], found: str, installed: datetime | None) -> Iterator[Finding]:
    """Another torch than the one that was built for. That of another minor version is refused when it is imported."""
    if not build:
        return
    rebuild = "rebuild optim_ext: pip install --no-build-isolation --no-deps --force-reinstall . in its source folder"
    if build["torch"] != found:
        yield Finding("advice", "torch", f"built for torch {build['torch']}, and this is torch {found}", rebuild)
    elif installed is not None and installed > (built := datetime.fromisoformat(build["date"])):
        yield Finding(
            "advice",
            "torch",
            f"torch was installed ({installed:%Y-%m-%d %H:%M}) after optim_ext was built for it ({built:%Y-%m-%d %H:%M} UTC), so "
            "it may have been replaced",
            f"if anything is odd, {rebuild}",
        )


def _installed_at(package: str) -> datetime | None:
    """When pip wrote down what it had installed."""
    try:
        record = next(file for file in metadata.files(package) or () if file.name == "RECORD")
        return datetime.fromtimestamp(Path(str(record.locate())).stat().st_mtime, timezone.utc)
    except (metadata.PackageNotFoundError, StopIteration, OSError):
        return None


def _about_gpus(build: dict[str, Any]) -> Iterator[Finding]:
    if torch.cuda.is_available():
        if build and build["cuda"] is None:
            why = build.get("cuda_reason") or "no toolkit"
            yield Finding(
                "advice",
                "cuda",
                f"torch sees {torch.cuda.device_count()} GPU, but optim_ext was built without CUDA ({why})",
                "rebuild with OPTIM_EXT_CUDA=1 and nvcc on the PATH; until then parameters on a GPU take torch's own code",
            )
    elif torch.version.cuda is None and (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        yield Finding(
            "advice",
            "cuda",
            f"this machine seems to have an NVIDIA GPU, and torch {torch.__version__} is without CUDA",
            "to use it install a torch with CUDA, then rebuild optim_ext",
        )


def usable_cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores this process may use: of its affinity, and of what its control group is given."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cores = os.cpu_count() or 1
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _about_threads(threads: int, cores: int, environment: Any) -> Iterator[Finding]:
    asked = environment.get("OMP_NUM_THREADS")
    said = f" (OMP_NUM_THREADS={asked})" if asked else ""
    processes = environment.get("LOCAL_WORLD_SIZE", "1")
    processes = int(processes) if processes.isdigit() else 1
    if threads * processes > cores:
        of = f"{threads} threads" + (f" in each of {processes} processes" if processes > 1 else "")
        yield Finding(
            "advice",
            "threads",
            f"torch uses {of}{said}, and this process may use {cores} cores",
            f"set OMP_NUM_THREADS={max(1, cores // processes)}",
        )
    elif processes == 1 and asked and threads < cores:
        yield Finding(
            "advice",
            "threads",
            f"torch uses {threads} threads{said} of the {cores} cores this process may use",
            f"set OMP_NUM_THREADS={cores} if nothing else needs them",
        )
    runtimes = openmp_runtimes()
    if len(runtimes) > 1:
        yield Finding(
            "advice",
            "threads",
            f"{len(runtimes)} OpenMP runtimes are loaded ({', '.join(runtimes)}), whose threads compete",
            "rebuild optim_ext with the compiler whose runtime torch brings (GCC)",
        )


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes loaded into this process."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    names = ("libgomp", "libomp", "libiomp")
    return sorted({line.split()[-1] for line in maps if any(name in line for name in names)})


def _about_rules() -> Iterator[Finding]:
    """What rules written in Python need to be compiled. They step without it, interpreted."""
    from optim_ext._rules import cache, compiler

    try:
        compiler.try_compiler(compiler.find_compiler()[0])
    except compiler.CannotCompile as error:
        yield Finding(
            "advice",
            "compiler",
            f"{error}, so rules written in Python are interpreted",
            "install g++ or clang, or name a compiler in CXX",
        )
    _, problems = cache.chosen()
    if problems:
        yield Finding(
            "advice",
            "cache",
            f"compiled rules cannot be kept where they should be: {'; '.join(problems)}",
            "set OPTIM_EXT_CACHE to a folder that you alone can write to",
        )
