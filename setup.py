"""Builds optim_ext._C against the torch that is installed: the CPU part always, the CUDA part where it can be had.

Environment:
  OPTIM_EXT_CUDA        0: CPU only; 1: stop where CUDA cannot be built; unset: CUDA if torch has it and a toolkit fits
  CUDA_HOME             the CUDA toolkit, looked at first
  TORCH_CUDA_ARCH_LIST  GPU architectures, such as "8.0;9.0"; unset: those of the GPUs at hand, else those torch has
  MAX_JOBS              compilers to run at a time
  OPTIM_EXT_NINJA       0: build without ninja, one file at a time
"""

import datetime
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
# One flag a line, read by CMake and clangd too. -fopenmp is for compiling only: without it at::parallel_for is serial,
# but linking with it could bring in a second OpenMP runtime beside the one torch ships.
CXX_FLAGS = (ROOT / "csrc/compile_flags.txt").read_text().split()
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-lineinfo"]
USUAL_TOOLKIT = Path("/usr/local/cuda")
NEEDS_TORCH = (
    "optim_ext is built against the torch you have, and here (perhaps in pip's isolated build) there is none; run: "
    "pip install --no-build-isolation . (after pip install torch, if you have none yet)"
)

NEEDS_NINJA = (
    "ninja is missing; without it one source is compiled at a time, and every one after each change. Run: "
    "pip install ninja (or set OPTIM_EXT_NINJA=0 to build without it)"
)

NEEDS_SETUPTOOLS = (
    "setuptools is too old to make wheels, as those of new environments of Python 3.10 and 3.11 are. Run: "
    "pip install 'setuptools>=70.1'"
)
# The rooms (folders of csrc) whose files include torch, and how many of them are compiled at once at most.
IN_UNITS = {(), ("call",), ("host",), ("ops",)}
UNIT_FILES = 12
MAKE_WHEELS = {"bdist_wheel", "dist_info", "editable_wheel"}


def sources(*suffixes):
    found = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)
    return [str(path.relative_to(ROOT)) for path in found]


def in_units(files, folder):
    """What is compiled for these sources: of the rooms that include torch, units of several files, because its headers take
    ten times as long as what is behind them. They are written into `folder`."""
    whole, rooms = [], {}
    for file in map(Path, files):
        if file.suffix == ".cpp" and file.parts[1:-1] in IN_UNITS:
            rooms.setdefault(file.parent.name, []).append(file)
        else:
            whole.append(str(file))
    for room, members in rooms.items():
        count = -(-len(members) // UNIT_FILES)
        for i in range(count):
            unit = Path(folder, f"{room}_{i + 1}.cpp")
            text = "".join(f'#include "{os.path.relpath(file, folder)}"\n' for file in members[i::count])
            if not unit.exists() or unit.read_text() != text:  # it is compiled again only where it changes
                unit.parent.mkdir(parents=True, exist_ok=True)
                unit.write_text(text)
            whole.append(str(unit))
    return whole


def toolkit_candidates():
    """The places a CUDA toolkit may be, best first."""
    if os.environ.get("CUDA_HOME"):
        yield "CUDA_HOME", Path(os.environ["CUDA_HOME"])
    yield "the usual folder", USUAL_TOOLKIT
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return
    # The nvcc on PATH may be a wrapper script far from its toolkit, so it is asked where it lives.
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    yield f"nvcc on PATH ({nvcc})", Path(top[1] if top else Path(nvcc).resolve().parents[1]).resolve()


def find_toolkit(torch_cuda):
    """The toolkit of torch's CUDA major version, or None; and a line for each place looked at."""
    looked = []
    for origin, home in toolkit_candidates():
        nvcc = home / "bin/nvcc"
        if not nvcc.exists() or not (home / "include/cuda_runtime.h").exists():
            looked.append(f"{origin}: {home} (needs bin/nvcc and include/cuda_runtime.h)")
            continue
        release = re.search(r"release (\d+)\.(\d+)", subprocess.check_output([nvcc, "--version"], text=True))
        looked.append(f"{origin}: {home} (CUDA {release[1]}.{release[2]})")
        if release[1] == torch_cuda.split(".")[0]:
            return home, looked
    return None, looked


def choose_cuda(torch):
    """The toolkit to build the CUDA part with, or None for a CPU build; and why."""
    wish = os.environ.get("OPTIM_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"OPTIM_EXT_CUDA={wish} is not understood; use 0, 1 or leave it unset.")
    if wish == "0":
        return None, "OPTIM_EXT_CUDA=0"
    if torch.version.cuda is None:
        if wish == "1":
            sys.exit(f"OPTIM_EXT_CUDA=1, but torch {torch.__version__} is built without CUDA; install one with CUDA.")
        return None, "torch is built without CUDA"
    toolkit, looked = find_toolkit(torch.version.cuda)
    if toolkit is None:
        problem = f"no CUDA toolkit fits torch's CUDA {torch.version.cuda}; looked at " + "; ".join(looked)
        if wish == "1":
            sys.exit(f"OPTIM_EXT_CUDA=1, but {problem}. Set CUDA_HOME to one.")
        return None, problem
    return toolkit, looked[-1]


def cuda_archs(torch, toolkit):
    """Compute capabilities to build for, as TORCH_CUDA_ARCH_LIST spells them."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    listed = subprocess.check_output([toolkit / "bin/nvcc", "--list-gpu-arch"], text=True)
    known = sorted(int(number) for number in re.findall(r"compute_(\d+)\b", listed))
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    visible = {10 * major + minor for major, minor in capabilities}
    # A GPU newer than nvcc runs the newest code nvcc knows, through PTX.
    wanted = {min(number, known[-1]) for number in visible}
    wanted = wanted or {int(number) for number in re.findall(r"sm_(\d+)", torch._C._cuda_getArchFlags() or "")}
    chosen = sorted(wanted & set(known)) or known[-1:]
    return ";".join(f"{number // 10}.{number % 10}" for number in chosen) + "+PTX"


def default_jobs():
    """One compiler per core, as far as 2 GB of memory for each goes: the torch headers are large."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // 2**31))


def build_switches():
    """Everything this build decides, decided once and recorded."""
    try:
        import torch
    except ImportError:
        sys.exit(NEEDS_TORCH)
    if tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        sys.exit(f"optim_ext needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, found {torch.__version__}.")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit("Python.h is missing: install Python's development headers (on Debian and Ubuntu: python3-dev).")
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(f"The C++ compiler {compiler} is missing: install g++, or set CXX to another one.")
    if os.environ.get("OPTIM_EXT_NINJA") != "0" and shutil.which("ninja") is None:
        sys.exit(NEEDS_NINJA)
    toolkit, why = choose_cuda(torch)
    archs = cuda_archs(torch, toolkit) if toolkit else None
    timestamp = float(os.environ.get("SOURCE_DATE_EPOCH", datetime.datetime.now().timestamp()))
    return {
        "version": re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1],
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if toolkit else None,
        "cuda_toolkit": str(toolkit) if toolkit else None,
        "cuda_reason": why,
        "cuda_archs": archs,
        "compiler": subprocess.check_output([*compiler.split(), "--version"], text=True).splitlines()[0],
        "cxx_flags": " ".join(CXX_FLAGS),
        "nvcc_flags": " ".join(NVCC_FLAGS) if toolkit else None,
        "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
        "python": platform.python_version(),
        "platform": sysconfig.get_platform(),
        "date": datetime.datetime.fromtimestamp(timestamp, datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def wait_for_other_builds(folder):
    """Returns once this process is the only one that builds in `folder`, which it then is until it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    # Never closed: the lock is the process's own (so a build tool may run this file twice) and goes with it.
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"Another build of {ROOT} is running; waiting for its end.", file=sys.stderr, flush=True)
        fcntl.lockf(lock, fcntl.LOCK_EX)


def write_build_info(switches, folder):
    lines = [f"    {key!r}: {value!r}," for key, value in switches.items()]
    Path(folder, "_build_info.py").write_text("\n".join(["# Written by setup.py.", "BUILD_INFO = {", *lines, "}", ""]))


def copy_headers(to):
    """What rules written in Python are compiled with (optim_ext/_rules/compiler.py)."""
    for path in [*map(Path, sources(".h")), Path("csrc/compile_flags.txt")]:
        inside = path.relative_to("csrc")
        if (
            inside.parts[0] not in ("rules", "storage", "kernels", "device", "compile_flags.txt")
            or "double" in inside.parts
        ):
            continue
        (to / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, to / inside)


def native_build():
    """The setup() arguments of a build; a source distribution needs none of this, and no torch."""
    # A virtual environment's own ninja is found although the environment may not be activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    makes_wheels = find_spec("setuptools.command.bdist_wheel") or find_spec("wheel")
    if MAKE_WHEELS & set(sys.argv) and not makes_wheels:
        sys.exit(NEEDS_SETUPTOOLS)
    switches = build_switches()
    print("\n".join(f"optim_ext {key} = {value}" for key, value in switches.items()), flush=True)
    wait_for_other_builds(ROOT / "build")
    if switches["cuda"]:  # read by torch.utils.cpp_extension when it is imported
        os.environ["CUDA_HOME"] = switches["cuda_toolkit"]
        os.environ["TORCH_CUDA_ARCH_LIST"] = switches["cuda_archs"]
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # One build folder per torch: objects made for one are of no use to another.
    base = f"build/torch-{switches['torch']}-{'cuda' if switches['cuda'] else 'cpu'}-{sys.implementation.cache_tag}"

    class BuildPython(build_py):
        def run(self):
            package = Path(self.build_lib, "optim_ext")
            shutil.rmtree(package, ignore_errors=True)  # modules that are gone by now
            super().run()
            if not self.editable_mode:
                copy_headers(package / "csrc")

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = f"{base}/objects"  # kept from one editable build to the next too, for ninja to reuse

        def run(self):
            super().run()
            # Beside the module, not into the sources: each build of one tree keeps its own record.
            write_build_info(switches, Path(self.get_ext_fullpath("optim_ext._C")).parent)

    files = [path for path in sources(".cpp", ".cu") if switches["cuda"] or not re.search(r"_cuda\.cpp$|/cuda/", path)]
    # The largest unit alone takes minutes for all of torch's architectures, and others are done by then.
    threads = ["--threads=2"] if ";" in (switches["cuda_archs"] or "") else []
    module = (CUDAExtension if switches["cuda"] else CppExtension)(
        "optim_ext._C",
        in_units(files, f"{base}/units"),
        depends=[*sources(".h", ".cuh"), "csrc/compile_flags.txt", "setup.py"],
        define_macros=[("OPTIM_EXT_WITH_CUDA", None)] if switches["cuda"] else [],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS + threads},
    )
    commands = {"build_py": BuildPython, "build_ext": Build}
    return {"ext_modules": [module], "cmdclass": commands, "options": {"build": {"build_base": base}}}


if __name__ == "__main__":
    builds_nothing = {"sdist", "egg_info", "clean", "--version", "--help"} & set(sys.argv)
    setup(license="MIT", **({} if builds_nothing else native_build()))
