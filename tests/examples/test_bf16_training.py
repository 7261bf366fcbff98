"""examples/bf16_training.py and benchmarks/precision.py, from the command line to what they print."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from programs import run


def test_a_short_run_compares_all_ways(tmp_path):
    picture = tmp_path / "bf16.png"
    done = run("examples/bf16_training.py", "--steps", 3, "--output", picture)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(\w.*?) {2,}(\S+) +(\S+) +(\S+)$", done.stdout, re.M)
    held = {way: float(of_one) for way, _, of_one, _ in rows}
    assert list(held) == ["float32", "bf16 native", "bf16 remainder", "bf16 stochastic", "bf16 remainder, q8 state"]
    assert held["bf16 remainder, q8 state"] < held["bf16 stochastic"] < held["bf16 remainder"] < held["float32"]
    assert picture.stat().st_size > 1000


def test_the_benchmark_measures_bytes_and_where_parameters_go():
    done = run("benchmarks/precision.py", "--threads", 1, "--rows", 64, "--rounds", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in done.stdout.splitlines() if line.startswith("| ")
    }
    assert rows["remainder"][0] == "14.00" and rows["remainder, q8 state"][0] == "8.03"
    assert rows["stochastic, q8 state"][0] == "6.03" and rows["master"][0] == "16.00"
    assert rows["bf16 alone"][2] == "1.0000"
