"""examples/swa_digits.py, from the command line to the picture."""

import re
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from programs import run


def test_the_average_is_accurate_and_resuming_changes_nothing(tmp_path):
    picture = tmp_path / "curves.png"
    done = run("examples/swa_digits.py", "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = float(re.search(r"^averaged weights +([\d.]+)%", done.stdout, re.MULTILINE)[1])
    assert accuracy >= 97
    assert "resumed after epoch 15: the same weights, bit for bit" in done.stdout
    with Image.open(picture) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(maxcolors=2**20)) > 20


def test_too_few_epochs_are_refused():
    done = run("examples/swa_digits.py", "--epochs", "2")
    assert done.returncode == 2 and "at least 4" in done.stderr
