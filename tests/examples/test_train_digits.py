"""examples/train_digits.py, from the command line to the picture."""

import re
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from programs import run

ROW = re.compile(r"^(\w+) +([\d.]+)% +([\d.]+)% +(\S+) +(\d+) us +(\d+) us +([\d.]+)x +(\w+)", re.MULTILINE)


def test_one_optimizer_reaches_the_accuracy_and_torchs_curve(tmp_path):
    picture = tmp_path / "loss_curves.png"
    done = run("examples/train_digits.py", "--optimizer", "adamw", "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    name, theirs, ours, difference, *_, verdict = ROW.search(done.stdout).groups()
    assert (name, verdict) == ("adamw", "passed")
    assert min(float(theirs), float(ours)) >= 97
    assert float(difference) <= 0.02
    assert "adamw" in done.stderr and "100%" in done.stderr  # the progress bar
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(maxcolors=2**20)
        assert image.format == "PNG" and min(image.size) > 300 and len(colours) > 20


def test_too_little_training_is_an_error(tmp_path):
    done = run(
        "examples/train_digits.py", "--optimizer", "adagrad", "--epochs", "1", "--output", tmp_path / "curves.png"
    )
    assert done.returncode == 1
    assert ROW.search(done.stdout).groups()[-1] == "FAILED"


def test_unknown_optimizer_is_refused():
    done = run("examples/train_digits.py", "--optimizer", "lion")
    assert done.returncode == 2 and "invalid choice" in done.stderr
