"""benchmarks/step_time.py: the models' sizes, the loop that measures the memory limit, and one small run."""

import json
import math
import shutil
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
import step_time
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
        assert cell["ratio"] == pytest.approx(cell["ms"][best] / cell["ms"]["optim_ext"])
        assert cell["cold_ratio"] == pytest.approx(
            min(cell["cold_ms"][mode] for mode in ("default", "foreach", "fused") if mode in cell["cold_ms"])
            / cell["cold_ms"]["optim_ext"]
        )
    for picture in ("step_time.png", "step_time_small.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    assert "| AdamW |" in done.stdout

    pages = [tmp_path / name for name in ("performance.md", "README.md")]
    for page, kept in zip(pages, (ROOT / "docs" / "performance.md", ROOT / "README.md"), strict=True):
        shutil.copy(kept, page)
    report.refresh(tmp_path / "step_time.json", *pages)
    for page, kept in zip(pages, ("## The memory limit", "## Where to read more"), strict=True):
        assert "| AdamW |" in page.read_text() and "Adadelta |" not in page.read_text() and kept in page.read_text()


def test_times_of_a_row_belong_together():
    """Half of the rounds met a machine that is half as fast, more of them in one mode's turn than in the other's: medians
    of their own say 100 beside 195 for two modes that were alike in every round but those between."""
    ours = [100.0, 100.0, 100.0, 200.0, 200.0]
    theirs = [102.0, 102.0, 195.0, 204.0, 204.0]
    ms = step_time.times_together({step_time.OURS: ours, "fused": theirs})
    assert ms[step_time.OURS] == pytest.approx(100.0 * 1e3)
    assert ms["fused"] == pytest.approx(102.0 * 1e3)


def test_where_the_compiled_mode_is_measured():
    def cells(which):
        every = [(case, key) for case in step_time.CASES for key in step_time.CASES[case].required]
        return {(case, key) for case, key in every if step_time.is_compiled(which, case, key)}

    assert cells("none") == set()
    assert cells("some") == {("resnet50", key) for key in ("adamw", "rmsprop-centered", "nadam")}
    assert cells("some") < cells("all")
    assert {case for case, _ in cells("all")}.isdisjoint({"small-mixed", "small-vectors", "embedding"})
    assert ("resnet50", "lion") not in cells("all")  # of which torch has nothing to compile


def test_the_compiled_mode_is_torchs_step():
    """On the same memory as the other modes, and compiled once."""
    case = step_time.Case("two small ones", [(4, 4), (4,)], {"adamw": 1.0})
    tensors = step_time.Tensors(case, torch.device("cpu"))
    optimizers = step_time.make_optimizers(step_time.ALGORITHMS["adamw"], case, tensors, with_compiled=True)
    compiled = optimizers[step_time.COMPILED]
    for gradients in tensors.gradients:
        for optimizer in optimizers.values():
            step_time.hand_out(gradients, optimizer)
            optimizer.step()
    first = compiled.compile_s
    assert first is not None and first > 0
    assert step_time.wrong_modes(optimizers, tensors.values, case.dtype, None) == []
    step_time.share_memory(optimizers)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    params = optimizers[step_time.OURS].param_groups[0]["params"]
    held = [p.detach().clone() for p in params]
    compiled.step()
    assert all(not torch.equal(p.detach(), old) for p, old in zip(params, held, strict=True))
    assert compiled.compile_s == first and torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_tables_have_the_columns_that_say_something():
    def cell(**given):
        usual = {
            "case": "resnet50", "case_title": "ResNet-50", "algorithm": "adamw", "algorithm_title": "AdamW",
            "ms": {"default": 3.0, "fused": 1.1, "optim_ext": 1.0}, "wrong_modes": [], "best_torch_mode": "fused",
            "compile_s": None, "ratio": 1.1, "required_ratio": 1.0, "met": True, "of_limit": None, "cold_ratio": None,
            "host_us": {}, "launches": {}, "extra_mib": {"optim_ext": 0.0, "fused": 0.0},
        }  # fmt: skip
        return SimpleNamespace(**usual | given)

    def columns(*cells):
        return next(line for line in report.tables(list(cells)).splitlines() if line.startswith("| algorithm"))

    assert columns(cell()) == (
        "| algorithm | torch default | torch fused | optim_ext | ratio | required | extra MiB (ours / torch's best) |"
    )
    compiled = cell(ms={"default": 3.0, "compiled": 1.1, "optim_ext": 1.0, "DeepSpeed": 2.0}, compile_s=31.2)
    assert "| torch compiled | fastest other |" in columns(cell(), compiled)
    assert "| 1.10 (31 s to compile) | 2.00 DeepSpeed | 1.00 |" in report.tables([cell(), compiled])


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
