"""benchmarks/gpu.sh goes on where a part fails, and its page says what was measured and what was not."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPU_PAGE = ROOT / "benchmarks/gpu_page.py"


def page_of(results, tmp_path):
    page = tmp_path / "page.md"
    subprocess.run([sys.executable, GPU_PAGE, results, page], check=True)
    return page.read_text()


def test_nothing_is_there(tmp_path):
    page = page_of(tmp_path / "nothing", tmp_path)
    assert "Nothing was measured." in page
    assert page.count("| not measured |  |") == 7


def cell(**what):
    return {
        "case": "gpt2", "case_title": "GPT-2 124M", "algorithm": "adamw", "algorithm_title": "AdamW", "rounds": 7,
        "required_ratio": 1.0, "required_of_limit": 0.85, "ms": {"optim_ext": 2.0, "fused": 2.2, "memory limit": 1.8},
        "extra_mib": {"optim_ext": 0.0, "fused": 0.0}, "wrong_modes": [], "best_torch_mode": "fused", "compile_s": None,
        "ratio": 1.1, "ratio_quartiles": [1.0, 1.2], "gb_moved": 3.6, "of_limit": 0.9, "cold_ms": {}, "cold_ratio": None,
        "host_us": {}, "launches": {}, "met": True, **what,
    }  # fmt: skip


def test_what_is_there(tmp_path):
    small = cell(
        case="small-vectors", case_title="1000 tensors of 64", gb_moved=None, of_limit=None,
        host_us={"optim_ext": 140.0, "fused": 900.0}, launches={"optim_ext": 1, "fused": 12},
    )  # fmt: skip
    environment = {
        "date": "2030-01-02", "machine": "a GPU", "torch": "2.11.0", "python": "3.12", "load_average_before": 1.0,
    }  # fmt: skip
    written = {"environment": environment, "cells": [cell(), small]}
    (tmp_path / "step_time.json").write_text(json.dumps(written))
    (tmp_path / "lbfgs.json").write_text(json.dumps({"rows": [{"case": "100k", "ratio": 12.0}]}))
    (tmp_path / "steps.txt").write_text("build\t100\tpassed\ntests\t180\tout of time\n")
    (tmp_path / "tests.log").write_text("\n".join(f"line {i}" for i in range(30)))
    page = page_of(tmp_path, tmp_path)
    assert "2030-01-02, a GPU, torch 2.11.0, Python 3.12." in page
    assert "| AdamW float32, 124M: 85% of copy bandwidth | 90% | met |" in page
    assert "| AdamW float32, 1.3B: 85% of copy bandwidth | not measured |  |" in page
    assert "| 1000 small tensors: at most 100 us of the host | 140 us | **missed** |" in page
    assert "| L-BFGS, n = 100,000, m = 100: 10 times torch | 12.0x | met |" in page
    assert "| tests | 180 | out of time |" in page and "line 29" in page and "line 3\n" not in page
    assert "Copy bandwidth: 2000 GB/s (GPT-2 124M)." in page


STAND_IN = """#!/bin/sh
case "$*" in
  *gpu_page.py*) exec {python} "$@" ;;
  *"{failing}"*) echo "this fails"; exit 3 ;;
esac
"""


@pytest.mark.parametrize("failing", ["setup.py", "-m pytest", "step_time.py", "lbfgs.py"])
def test_the_script_goes_on_where_a_part_fails(failing, tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, failing=failing))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    page, results = tmp_path / "page.md", tmp_path / "results"
    environment = {**os.environ, "PYTHON": str(python), "PAGE": str(page), "COMPUTE_SANITIZER": "/bin/true"}
    command = ["bash", ROOT / "benchmarks/gpu.sh", results]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "failed: " in done.stderr
    ends = dict(line.split("\t")[::2] for line in (results / "steps.txt").read_text().splitlines())
    if failing == "setup.py":
        assert ends == {"build": "failed (3)"}
    else:
        assert list(ends) == ["build", "self-test", "tests", "step-time", "one-pass", "lbfgs", "sanitizer"]
        assert list(ends.values()).count("passed") == 6
    assert "## Goals" in page.read_text() and "this fails" in page.read_text()
