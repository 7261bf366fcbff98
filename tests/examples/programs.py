"""The repository's examples and benchmarks as their users start them: a process of its own in the project's folder."""

import atexit
import os
from functools import cache
from pathlib import Path

from forked import Forked

ROOT = Path(__file__).parents[2]
# What the programs import, and what torch brings in with the first optimizer.
MODULES = ("optim_ext", "torch._dynamo", "matplotlib.pyplot", "sklearn.datasets", "sklearn.model_selection", "tqdm")


def with_the_project(path):
    return os.pathsep.join(filter(None, [str(ROOT), path]))


@cache
def server():
    # On one thread: the test workers share the cores.
    forked = Forked(*MODULES, OMP_NUM_THREADS="1", PYTHONPATH=with_the_project(os.environ.get("PYTHONPATH")))
    atexit.register(forked.stop)
    return forked


def run(program, *arguments):
    """Run a script, given relative to the project."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": with_the_project(os.environ.get("PYTHONPATH")),
    }
    return server().run(ROOT / program, *arguments, cwd=ROOT, environment=environment)
