"""Processes of one machine that torch.distributed joins (gloo), and the cases they run: for tests/distributed."""

import ast
import json
import os
import selectors
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
from device import ON_CPU
from forked import Forked

SECONDS = 240  # for one case, on a machine that has other work


def cases_in(program):
    """The names in the list CASES of a program, without importing what the processes need."""
    for node in ast.parse(program.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "CASES":
            return [element.id for element in node.value.elts]
    raise AssertionError(f"{program.name} lists no CASES")


class Rank:
    """A process, to which lines are written and that answers with lines; what it complains of goes into the log."""

    def __init__(self, forked, log, *argv):
        asked, self.stdin = (os.fdopen(file, mode) for file, mode in zip(os.pipe(), "rw", strict=True))
        self.stdout, answers = (os.fdopen(file, mode) for file, mode in zip(os.pipe(), "rw", strict=True))
        with asked, answers, log.open("w") as errors:
            self.process = forked.start(*argv, files=[file.fileno() for file in (asked, answers, errors)])

    def stop(self):
        self.process.kill()
        self.stdout.close()
        try:
            self.stdin.close()
        except BrokenPipeError:  # a line it has not read
            pass


class Processes:
    """The ranks, which serve one case after the other: each runs ``python PROGRAM RANK WORLD FOLDER``. They meet in a file
    of that folder."""

    def __init__(self, forked, program, world, folder):
        self.world, self.stopped = world, False
        (folder / f"meet of {world}").unlink(missing_ok=True)  # of processes that are gone
        self.logs = [folder / f"log of rank {rank} of {world}" for rank in range(world)]
        self.ranks = [Rank(forked, log, program, rank, world, folder) for rank, log in enumerate(self.logs)]

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
            rank.stop()


class Worlds:
    """Processes of one program and folder, by their number: those of the last case go on with the next one if they are as
    many. All are forks of a process that has imported what the program imports, as far as it may."""

    def __init__(self, program, folder):
        tests = Path(__file__).parent
        path = [os.environ.get("PYTHONPATH"), str(tests.parent), str(tests), str(program.parent)]
        self.forked = Forked(
            # torch's own test modules, which the programs import, look for GPUs; no fork may use one then.
            program.stem if ON_CPU else "torch.distributed.fsdp",
            OMP_NUM_THREADS="1",
            PYTHONFAULTHANDLER="1",  # a crash leaves where it was in the rank's log
            PYTHONPATH=os.pathsep.join(filter(None, path)),
        )
        self.program, self.folder, self.processes = program, folder, None

    def expect(self, world, case):
        if self.processes is None or self.processes.world != world or self.processes.stopped:
            self.stop_processes()  # few are to wait while others work
            self.processes = Processes(self.forked, self.program, world, self.folder)
        self.processes.expect(case)

    def stop_processes(self):
        if self.processes is not None and not self.processes.stopped:
            self.processes.stop()

    def stop(self):
        self.stop_processes()
        self.forked.stop()


def how_it_ended(rank):
    """Nothing for a process that is still there."""
    # One that crashes takes a moment to be gone.
    return f" and ended with {rank.process.exit_code}" if rank.process.ends_within(0.5) else ""


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
