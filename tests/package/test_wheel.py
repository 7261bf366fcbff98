"""A wheel of this project, installed where there are no sources: what it holds, and what runs from it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
import optim_ext
from optim_ext.math import sign

assert optim_ext.__file__.startswith(sys.argv[1]), optim_ext.__file__


@optim_ext.rule(state=("exp_avg",))
def Tiger(param, grad, exp_avg, *, lr=1e-3, beta=0.965, weight_decay=0.01):
    exp_avg = beta * exp_avg + (1 - beta) * grad
    return param * (1 - lr * weight_decay) - lr * sign(exp_avg), exp_avg


if sys.argv[2] == "compile":
    Tiger.compile()
torch.manual_seed(0)
param = torch.nn.Parameter(torch.randn(1000))
optimizer = Tiger([param], lr=1e-2)
for _ in range(3):
    param.grad = torch.randn(1000)
    optimizer.step()
print(optim_ext.explain(optimizer))
print(param.detach().view(torch.int32).sum().item())
"""


@pytest.fixture(scope="session")
def wheel(root, kernel_objects, tmp_path_factory):
    """Built as `make wheel` does, from the objects of the module under test where these are at hand: by the compiler that
    made them, as another one would make all of them again."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, root]
    environment = {**os.environ, "OPTIM_EXT_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if kernel_objects is not None:
        rules = (kernel_objects.parents[2] / "build.ninja").read_text()
        environment["CXX"] = re.search(r"^cxx = (?:ccache )?(.+)$", rules, re.MULTILINE)[1]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("optim_ext-*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """Runs Python in an empty folder, with the wheel that pip has installed and no other files of this project."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    def run(*arguments, cwd, **environment):
        variables = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(site),
            "OMP_NUM_THREADS": "1",
            "OPTIM_EXT_CACHE": str(cwd / "cache"),
            **environment,
        }
        done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.site = site
    return run


def test_it_holds_the_module_its_types_and_what_rules_are_compiled_with(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    inside = {name for name in names if name.startswith("optim_ext/")}
    assert {"optim_ext/py.typed", "optim_ext/_C.pyi", "optim_ext/_build_info.py"} <= inside
    assert {
        "optim_ext/csrc/compile_flags.txt",
        "optim_ext/csrc/kernels/cpu/one_rule.h",
        "optim_ext/csrc/kernels/cuda/one_rule.h",
        "optim_ext/csrc/rules/rule.h",
    } <= inside
    assert len([name for name in inside if name.endswith(".so")]) == 1
    others = {name for name in names - inside if ".dist-info/" not in name}
    assert others == set()
    assert not [name for name in inside if name.endswith((".cpp", ".cu", ".o", ".pyc"))]


def test_it_tests_itself_in_an_empty_folder(installed, tmp_path):
    assert "Traceback" not in installed("-m", "optim_ext", cwd=tmp_path)


def test_a_rule_steps_from_it_with_and_without_a_compiler(installed, tmp_path):
    """To the same bits."""
    (tmp_path / "program.py").write_text(PROGRAM)
    absent = str(tmp_path / "no folder")
    compiled = installed("program.py", installed.site, "compile", cwd=tmp_path)
    alone = installed("program.py", installed.site, "step", cwd=tmp_path, PATH=absent, OPTIM_EXT_CACHE=absent)
    assert "per device, compiled" in compiled and "per device, interpreted" in alone
    assert compiled.splitlines()[-1] == alone.splitlines()[-1]


def test_tests_pass_without_the_sources(installed, root, tmp_path):
    shutil.copytree(root / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    chosen = ["tests/kernels/test_recorded_bits.py", "tests/optim/test_construct.py"]
    environment = {name: value for name, value in os.environ.items() if name.startswith("HYPOTHESIS")}
    out = installed("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, cwd=tmp_path, **environment)
    assert " passed" in out and "failed" not in out
    assert not Path(tmp_path / "optim_ext").exists()
