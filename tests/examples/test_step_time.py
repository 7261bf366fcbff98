"""benchmarks/step_time.py: the models' sizes, the loop that measures the memory limit, and one small run."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from programs import ROOT, run

sys.path.insert(0, str(ROOT / "benchmarks"))

import report
import shapes
from memory_limit import MemoryLoop


def test_shapes_are_those_of_the_published_models():
    # Parameter counts: Radford et al. 2019 as released (tied embeddings), and torchvision's resnet50.
    assert sum(map(math.prod, shapes.gpt2())) == 124_439_808
    assert sum(map(math.prod, shapes.resnet50())) == 25_557_032
    assert len(shapes.gpt2()) == 148 and len(shapes.resnet50()) == 161
    assert len(shapes.small_mixed()) == len(shapes.small_vectors()) == 1000


@pytest.mark.parametrize("updated", range(6))
def test_memory_loop_reads_and_writes_back_without_changing_anything(updated):
    sizes = [(3,), (64, 64), (100_003,), (0,)]
    gradients = [torch.randn(size) for size in sizes]
    streams = [[torch.randn(size) for size in sizes] for _ in range(updated)]
    before = [[t.clone() for t in stream] for stream in [gradients, *streams]]
    loop = MemoryLoop(gradients, streams)
    loop()
    assert loop.bytes == sum(t.nbytes for t in gradients) * (1 + 2 * updated)
    for stream, copies in zip([gradients, *streams], before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(stream, copies, strict=True))


def test_memory_loop_refuses_operands_of_different_sizes():
    with pytest.raises(ValueError, match="equally large"):
        MemoryLoop([torch.zeros(8)], [[torch.zeros(9)]])
    with pytest.raises(ValueError, match="equally large"):
        MemoryLoop([torch.zeros(4, 4)], [[torch.zeros(4, 4).t()]])


def test_one_small_run(tmp_path):
    arguments = ("--quick", "--threads", "1", "--case", "small-vectors", "--algorithm", "adamw", "rmsprop")
    done = run("benchmarks/step_time.py", *arguments, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "step_time.json").read_text())
    adamw, rmsprop = document["cells"]
    assert {"optim_ext", "default", "foreach", "fused"} <= adamw["ms"].keys()
    assert "fused" not in rmsprop["ms"]  # torch has none
    assert adamw["wrong_modes"] == rmsprop["wrong_modes"] == []
    for cell in (adamw, rmsprop):
        best = min(("default", "foreach", "fused"), key=lambda mode: cell["ms"].get(mode, math.inf))
        assert cell["best_torch_mode"] == best
        assert cell["rounds"] == 3
        assert cell["ratio"] > 0 and cell["cold_ratio"] > 0
    assert (tmp_path / "step_time.png").stat().st_size > 10_000
    assert "| AdamW |" in done.stdout


def test_without_pytorch_optimizer(tmp_path, monkeypatch):
    (tmp_path / "pytorch_optimizer.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ("--quick", "--threads", "1", "--case", "small-vectors", "--output-dir", tmp_path, "--algorithm")
    done = run("benchmarks/step_time.py", *arguments, "lion", "sgd", "lamb", "lars")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("Without pytorch_optimizer, so without Lion, LAMB, LARS") == 1
    document = json.loads((tmp_path / "step_time.json").read_text())
    assert [cell["algorithm"] for cell in document["cells"]] == ["sgd"]
    assert (tmp_path / "step_time.png").exists()
    done = run("benchmarks/step_time.py", *arguments, "lion")
    assert done.returncode == 2 and "none of these algorithms can be measured" in done.stderr


def test_verdicts():
    def cell(**given):
        return SimpleNamespace(**{"met": False, "ratio": 1.2, "cold_ratio": None, "of_limit": None} | given)

    assert report.verdict(cell(met=True)) == "met"
    assert report.verdict(cell()) == "missed"
    assert report.verdict(cell(of_limit=0.95)) == "at the limit"
    assert report.verdict(cell(of_limit=0.85)) == "missed"
    assert report.verdict(cell(of_limit=0.95, ratio=0.9)) == "missed"
