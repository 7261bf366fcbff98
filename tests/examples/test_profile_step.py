"""What torch.profiler shows of a step, and the example that prints it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from programs import run

OPS = {"SGD": "sgd_", "Adam": "adam_", "AdamW": "adamw_", "RMSprop": "rmsprop_", "Adagrad": "adagrad_"}


@pytest.mark.parametrize("name", OPS)
def test_the_native_op_runs_inside_the_step(name, tmp_path):
    trace, picture = tmp_path / "trace.json", tmp_path / "step.png"
    done = run("examples/profile_step.py", "--optimizer", name, "--trace", trace, "--output", picture)
    assert done.returncode == 0, done.stderr
    table, inside = done.stdout.split("Inside the optimizer")
    assert f"Optimizer.step#{name}.step" in table
    lines = inside.splitlines()
    step = next(i for i, line in enumerate(lines) if line.startswith(f"Optimizer.step#{name}.step"))
    children = [line.split()[0] for line in lines[step + 1 :] if line.startswith("  ") and line[2] != " "]
    assert children.count(f"optim_ext::{OPS[name]}") == 1
    assert not any(child.startswith("aten::") for child in children)  # nothing but the one op does the work

    assert picture.stat().st_size > 1000
    events = json.loads(trace.read_text())["traceEvents"]
    (op,) = (event for event in events if event.get("name") == f"optim_ext::{OPS[name]}")
    shapes = [[1024, 256], [1024], [1024, 1024], [1024], [10, 1024], [10]]
    assert op["args"]["Input Dims"][0] == shapes  # params
    assert op["args"]["Input Dims"][1] == shapes  # grads
