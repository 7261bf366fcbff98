"""DDP, FSDP, ZeRO and distributed checkpoints on two processes of one machine (gloo): see cases.py."""

import ast
import json
import os
import selectors
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
WORLD = 2
SECONDS = 240  # for one case, on a machine that has other work


def programs():
    """The names in the list CASES, without importing what the processes need."""
    for node in ast.parse((FOLDER / "cases.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CASES":
            return [element.id for element in node.value.elts]
    raise AssertionError("cases.py lists no CASES")


class Processes:
    """The ranks, which have torch.distributed imported and serve one case after the other."""

    def __init__(self, folder):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        self.logs = [folder / f"log of rank {rank}" for rank in range(WORLD)]
        self.ranks = []
        for rank, log in enumerate(self.logs):
            with log.open("w") as errors:
                command = [sys.executable, str(FOLDER / "cases.py"), str(rank), str(WORLD), str(folder)]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
                self.ranks.append(subprocess.Popen(command, env=environment, text=True, **pipes))

    def run(self, program):
        """What each rank says to it: None where the case held. Ranks that wait for one that has failed say so."""
        for rank in self.ranks:
            rank.stdin.write(f"{program}\n")
            rank.stdin.flush()
        said = dict.fromkeys(range(WORLD), "waits for the other, or is gone")
        with selectors.DefaultSelector() as answers:
            for i, rank in enumerate(self.ranks):
                answers.register(rank.stdout, selectors.EVENT_READ, i)
            while answers.get_map() and (ready := answers.select(SECONDS)):
                for key, _ in ready:
                    line = key.fileobj.readline()
                    said[key.data] = json.loads(line) if line else said[key.data]
                    answers.unregister(key.fileobj)
                if any(said[key.data] for key, _ in ready):
                    break
        return list(said.values())

    def stop(self):
        for rank in self.ranks:
            rank.kill()
            rank.communicate()


@pytest.fixture(scope="module")
def running():
    """The processes that the last case has left in order, if any."""
    kept = []
    yield kept
    for processes in kept:
        processes.stop()


@pytest.mark.parametrize("program", programs())
def test_on_two_processes(program, running, tmp_path):
    processes = running.pop() if running else Processes(tmp_path)
    said = processes.run(program)
    if said != [None] * WORLD:
        processes.stop()
        pytest.fail("\n".join(f"{answer}\n{log.read_text()}" for answer, log in zip(said, processes.logs, strict=True)))
    running.append(processes)
