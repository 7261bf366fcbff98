"""Processes of one machine that torch.distributed joins (gloo), and the cases they run: for tests/distributed."""

import ast
import json
import os
import selectors
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest

SECONDS = 240  # for one case, on a machine that has other work


def cases_in(program):
    """The names in the list CASES of a program, without importing what the processes need."""
    for node in ast.parse(program.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CASES":
            return [element.id for element in node.value.elts]
    raise AssertionError(f"{program.name} lists no CASES")


class Processes:
    """The ranks, which have torch.distributed imported and serve one case after the other: each runs
    ``python PROGRAM RANK WORLD FOLDER``. They meet in a file of that folder."""

    def __init__(self, program, world, folder):
        tests = Path(__file__).parent
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # a crash leaves where it was in the rank's log
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(tests.parent), str(tests)])),
        }
        self.world, self.stopped = world, False
        (folder / f"meet of {world}").unlink(missing_ok=True)  # of processes that are gone
        self.logs = [folder / f"log of rank {rank} of {world}" for rank in range(world)]
        self.ranks = []
        for rank, log in enumerate(self.logs):
            with log.open("w") as errors:
                command = [sys.executable, str(program), str(rank), str(world), str(folder)]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
                self.ranks.append(subprocess.Popen(command, env=environment, text=True, **pipes))

    def run(self, case):
        """What each rank says to it: None where the case held. Ranks that wait for one that has failed say so."""
        for rank in self.ranks:
            rank.stdin.write(f"{case}\n")
            rank.stdin.flush()
        said = dict.fromkeys(range(self.world), "has not answered")
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

    def expect(self, case):
        """Runs a case, which has to hold on all ranks; the processes are of no more use where it does not."""
        said = self.run(case)
        if said != [None] * self.world:
            ends = [how_it_ended(rank) for rank in self.ranks]
            self.stop()
            parts = zip(said, ends, self.logs, strict=True)
            pytest.fail("\n".join(f"{answer}{end}\n{log.read_text()[-5000:]}" for answer, end, log in parts))

    def stop(self):
        self.stopped = True
        for rank in self.ranks:
            rank.kill()
            rank.communicate()


class Worlds:
    """Processes of one program and folder, by their number: those of the last case go on with the next one if they are as
    many, as they take seconds to start."""

    def __init__(self, program, folder):
        self.program, self.folder, self.processes = program, folder, None

    def expect(self, world, case):
        if self.processes is None or self.processes.world != world or self.processes.stopped:
            self.stop()  # few are to wait while others work
            self.processes = Processes(self.program, world, self.folder)
        self.processes.expect(case)

    def stop(self):
        if self.processes is not None:
            self.processes.stop()


def how_it_ended(rank):
    """Nothing for a process that is still there."""
    try:
        return f" and ended with {rank.wait(0.5)}"  # one that crashes takes a moment to be gone
    except subprocess.TimeoutExpired:
        return ""


def serve(cases):
    """Answers each name with a line of JSON: null, or the traceback of what the case raised."""
    import torch.distributed as dist
    from device import put_test_tensors_there

    put_test_tensors_there()
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    answers, sys.stdout = sys.stdout, sys.stderr  # where whatever else is printed goes
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet of {world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS / 2),  # nothing waits for ever
    )
    by_name = {case.__name__: case for case in cases}
    for line in sys.stdin:
        try:
            by_name[line.strip()]()
            dist.barrier()
            said = None
        except BaseException:
            said = traceback.format_exc()
        print(json.dumps(said), file=answers, flush=True)
    dist.destroy_process_group()
