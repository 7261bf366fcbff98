"""DDP, FSDP, ZeRO and distributed checkpoints on two processes of one machine (gloo): see cases.py."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
WORLD = 2


def programs():
    """The names in the list CASES, without importing what the processes need."""
    for node in ast.parse((FOLDER / "cases.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CASES":
            return [element.id for element in node.value.elts]
    raise AssertionError("cases.py lists no CASES")


@pytest.mark.parametrize("program", programs())
def test_on_two_processes(program, tmp_path):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "SCRATCH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(FOLDER / "cases.py"), program, str(rank), str(WORLD)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * WORLD, "\n".join(said)
