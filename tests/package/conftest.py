import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from forked import Forked

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
def python_with_torch():
    """The same in a process that has torch imported, but not optim_ext."""
    forked = Forked("torch", PYTHONPATH=str(Path(optim_ext.__file__).parents[1]))

    def run(code, check=True):
        done = forked.run(code=code)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    yield run
    forked.stop()


@pytest.fixture(scope="session")
def kernel_objects(python):
    """The folder with the kernels' objects of the module under test, which a build in place leaves; None where the sources
    have changed since, or where it was built elsewhere."""
    script = ROOT / ".ci/kernel_objects.py"
    if not script.exists():
        return None  # a wheel is tested without the sources
    environment = {**os.environ, "PYTHONPATH": str(Path(optim_ext.__file__).parents[1])}
    done = subprocess.run([sys.executable, script], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip()) if done.stdout.strip() else None


@pytest.fixture(scope="session")
def cpp_build(kernel_objects):
    """The CMake build of the C++ tests, with the kernels of the module under test where they are at hand."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=tools)
    assert cmake, "cmake is missing: pip install cmake"
    folder = ROOT / "build/cpp-test"
    folder.mkdir(parents=True, exist_ok=True)
    option = f"-DOPTIM_EXT_KERNELS={kernel_objects or ''}"
    with FileLock(folder / "tests.lock"):
        for command in (["-S", ROOT, "-B", folder, option], ["--build", folder, "--target", "cpp_tests", "-j", "2"]):
            done = subprocess.run([cmake, *command], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder
