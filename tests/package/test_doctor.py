"""``python -m optim_ext doctor``: what is found, what to do about it, and what scripts are told."""

import json
import os
import re
import stat
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

import optim_ext
from optim_ext import _doctor

BUILD = optim_ext.build_info()
FOUND = str(torch.__version__)
BUILT = datetime.fromisoformat(BUILD["date"])


def doctor(*arguments, **environment):
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(optim_ext.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = ["-m", "optim_ext", "doctor", *arguments]
    return subprocess.run([sys.executable, *command], env=environment, cwd="/", capture_output=True, text=True)


def test_a_good_installation(tmp_path):
    done = doctor(OPTIM_EXT_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"optim_ext {optim_ext.__version__}, torch {FOUND}")
    assert "self-test ok   AdamW(defaults) float32 on cpu, native" in done.stdout
    assert lines[-1].startswith("doctor    0 faults, ")


def test_json(tmp_path):
    """Nothing else is on the output; advice alone is no failure."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = doctor("--json", OPTIM_EXT_CACHE=str(blocked), CXX="no-such-compiler")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["ok"] is True
    assert told["report"]["torch"] == FOUND and told["report"]["build"]["date"] == BUILD["date"]
    assert all(test["good"] for test in told["self_test"]) and len(told["self_test"]) > 50
    found = {finding["about"]: finding for finding in told["findings"]}
    assert found["compiler"]["kind"] == found["cache"]["kind"] == "advice"
    assert "no-such-compiler is missing" in found["compiler"]["found"] and str(blocked) in found["cache"]["found"]
    assert "OPTIM_EXT_CACHE" in found["cache"]["do"]


def test_where_the_module_cannot_be_imported(tmp_path):
    """A record of a build for another torch: the package is copied, as its record is."""
    package = tmp_path / "optim_ext"
    package.mkdir()
    for each in Path(optim_ext.__file__).parent.iterdir():
        if each.name != "_build_info.py" and each.name != "__pycache__":
            (package / each.name).symlink_to(each)
    (package / "_build_info.py").write_text(f"BUILD_INFO = { ({**BUILD, 'torch': '1.13.0'})!r}\n")
    for arguments in ([], ["--json"]):
        done = doctor(*arguments, PYTHONPATH=str(tmp_path))
        assert done.returncode == 1, done.stdout + done.stderr
        assert "built for torch 1.13.0 " in done.stdout and "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] is False and told["findings"][0]["kind"] == "fault" and told["self_test"] == []
    plain = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['doctor']; import optim_ext"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert "ImportError: optim_ext was built for torch 1.13.0" in plain.stderr


def test_a_self_test_that_fails_is_a_fault(python):
    done = python(
        """
import runpy, sys, optim_ext
hypers = optim_ext.Lion._hypers
optim_ext.Lion._hypers = lambda self, group: hypers(self, {**group, "lr": 0.5})
sys.argv = ["optim_ext", "doctor"]
runpy.run_module("optim_ext", run_name="__main__")
""",
        check=False,
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 1 and "fault     self-test: self-test FAIL Lion" in done.stdout


def test_arguments_that_are_not_understood():
    done = doctor("--yaml")
    assert done.returncode == 2 and done.stderr.startswith("usage: python -m optim_ext doctor")


def about(findings):
    return [(finding.kind, finding.about) for finding in findings]


def test_another_torch_than_built_for():
    assert list(_doctor._about_torch(BUILD, BUILD["torch"], BUILT - timedelta(days=1))) == []
    assert list(_doctor._about_torch({}, FOUND, None)) == []
    other = list(_doctor._about_torch(BUILD, "2.99.1", None))
    assert (
        about(other) == [("advice", "torch")] and "this is torch 2.99.1" in other[0].found and "rebuild" in other[0].do
    )
    replaced = list(_doctor._about_torch(BUILD, BUILD["torch"], BUILT + timedelta(hours=1)))
    assert about(replaced) == [("advice", "torch")] and "may have been replaced" in replaced[0].found


def test_when_torch_was_installed():
    assert _doctor._installed_at("torch") is not None
    assert _doctor._installed_at("no-such-package") is None


def test_a_gpu_that_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    built_without = list(_doctor._about_gpus({**BUILD, "cuda": None, "cuda_reason": "no nvcc"}))
    assert about(built_without) == [("advice", "cuda")]
    assert "torch sees 2 GPU, but optim_ext was built without CUDA (no nvcc)" in built_without[0].found
    assert list(_doctor._about_gpus({**BUILD, "cuda": "12.6"})) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "is without CUDA" in next(iter(_doctor._about_gpus(BUILD))).found


@pytest.mark.parametrize(
    "threads, cores, environment, words",
    [
        (8, 4, {}, "torch uses 8 threads, and this process may use 4 cores; set OMP_NUM_THREADS=4"),
        (8, 4, {"OMP_NUM_THREADS": "8"}, r"8 threads \(OMP_NUM_THREADS=8\), and"),
        (2, 4, {"LOCAL_WORLD_SIZE": "4"}, "2 threads in each of 4 processes, and .* 4 cores; set OMP_NUM_THREADS=1"),
        (1, 4, {"OMP_NUM_THREADS": "1"}, r"1 threads \(OMP_NUM_THREADS=1\) of the 4 cores"),
        (4, 4, {}, None),
        (2, 4, {}, None),  # somebody has said so in the program
        (1, 4, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4"}, None),
    ],
    ids=str,
)
def test_threads_and_cores(threads, cores, environment, words, monkeypatch):
    monkeypatch.setattr(_doctor, "openmp_runtimes", lambda: ["libgomp.so.1"])
    found = list(_doctor._about_threads(threads, cores, environment))
    assert about(found) == ([] if words is None else [("advice", "threads")])
    if words is not None:
        assert re.search(words, str(found[0])), str(found[0])


def test_two_openmp_runtimes(monkeypatch):
    monkeypatch.setattr(_doctor, "openmp_runtimes", lambda: ["libgomp.so.1", "libiomp5.so"])
    assert (
        "2 OpenMP runtimes are loaded (libgomp.so.1, libiomp5.so)" in next(iter(_doctor._about_threads(1, 1, {}))).found
    )


@pytest.mark.parametrize("text, most", [("max 100000", None), ("50000 100000", 1), ("100000 100000", 1)])
def test_cores_of_a_control_group(tmp_path, text, most):
    (tmp_path / "cpu.max").write_text(text)
    cores = len(os.sched_getaffinity(0))
    assert _doctor.usable_cores(tmp_path) == (cores if most is None else most)
    assert _doctor.usable_cores(tmp_path / "none") == cores
