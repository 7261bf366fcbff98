"""examples/train_char_lm.py and benchmarks/one_pass.py, from the command line to what they write."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from programs import run


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_a_short_run_follows_torch_and_resumes(autocast, tmp_path):
    picture = tmp_path / "char_lm.png"
    done = run("examples/train_char_lm.py", "--steps", 40, "--autocast", autocast, "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [
        [float(x) for x in re.search(rf"^{name} +(\S+) +(\S+)$", done.stdout, re.M).groups()]
        for name in ("first loss", "last loss")
    ]
    assert losses[0][0] == losses[0][1] and losses[1][1] < losses[0][1] - 1
    assert "passed" in done.stdout and "norm=" in done.stderr and "100%" in done.stderr
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(maxcolors=2**20)) > 20


def test_too_few_steps_are_refused(tmp_path):
    done = run("examples/train_char_lm.py", "--steps", "1", "--output", tmp_path / "char_lm.png")
    assert done.returncode == 2 and "--steps must be at least 4" in done.stderr


def test_one_pass_benchmark(tmp_path):
    arguments = ("--quick", "--threads", "1", "--case", "small-vectors")
    done = run("benchmarks/one_pass.py", *arguments, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (cell,) = json.loads((tmp_path / "one_pass.json").read_text())["cells"]
    assert cell["chain_ratio"] > 1 and cell["added"] > 0 and cell["of_read"] is None
    assert cell["chain_ms"].keys() == {"torch", "optim_ext"} and "clip + AdamW + EMA" in done.stdout
