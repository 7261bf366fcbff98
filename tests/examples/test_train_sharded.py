"""examples/train_sharded.py under torchrun: two processes train, one goes on from their checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from programs import ROOT, with_the_project


def launched(processes, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": with_the_project(os.environ.get("PYTHONPATH")),
    }
    program = [ROOT / "examples/train_sharded.py", *arguments]
    done = subprocess.run([*launcher, *program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_checkpoint_of_two_processes_goes_on_in_one(tmp_path):
    said = launched(2, "--steps", "12", "--folder", tmp_path)
    assert "passed" in said and "sharded over 2 processes" in said and "torch takes" in said
    picture = tmp_path / "curves.png"
    said = launched(1, "--resume", "--folder", tmp_path, "--output", picture)
    assert "passed" in said and "1 processes" in said
    assert picture.stat().st_size > 1000
