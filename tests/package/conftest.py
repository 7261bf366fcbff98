import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import optim_ext

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def python():
    """Runs Python code in a fresh process outside the source folder; returns the finished process."""

    def run(code, *arguments, cwd="/", check=True, **environment):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(Path(optim_ext.__file__).parents[1]), **environment},
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def cpp_build():
    """The CMake build of the torch-free rooms, in the folder `make cpp-test` uses; brought up to date first."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=tools)
    assert cmake, "cmake is missing: pip install cmake"
    folder = ROOT / "build/cpp-test"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "tests.lock"):
        for command in (["-S", ROOT, "-B", folder], ["--build", folder, "-j", "2"]):
            done = subprocess.run([cmake, *command], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder
