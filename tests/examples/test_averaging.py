"""benchmarks/averaging.py: a short run prints its tables and writes what they are made of."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from programs import run


def test_a_short_run(tmp_path):
    done = run(
        "benchmarks/averaging.py", "--case", "small-vectors", "--quick", "--threads", "1", "--output-dir", tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "averaging.json").read_text())
    assert ", 1 of " in document["environment"]["machine"]
    assert [cell["average"] for cell in document["cells"]] == ["SWA", "EMA", "step"]
    for cell in document["cells"]:
        assert cell["rounds"] == 3 and all(ms > 0 for ms in cell["ms"].values())
        assert cell["title"] in done.stdout
    assert document["cells"][2]["of_plain_step"]["step alone"] == 1
    assert done.stdout.count("| 1000 tensors of 64 |") == 3


def test_no_rounds_are_refused():
    done = run("benchmarks/averaging.py", "--repeats", "0")
    assert done.returncode == 2 and "at least 1" in done.stderr
