"""examples/race_rules.py, from the command line to the picture."""

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from programs import run


def test_every_rule_learns_the_digits(tmp_path):
    picture = tmp_path / "race.png"
    done = run("examples/race_rules.py", "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("native passed") == 13
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 300
