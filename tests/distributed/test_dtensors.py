"""DTensor parameters on one, two and four processes of one machine (gloo), on a GPU on one: see dtensor_cases.py."""

from pathlib import Path

import pytest
from device import ON_CPU
from ranks import Processes, cases_in

PROGRAM = Path(__file__).with_name("dtensor_cases.py")
WORLDS = (1, 2, 4) if ON_CPU else (1,)


@pytest.fixture(scope="module")
def running():
    """The processes that the last case has left in order, by their number."""
    kept = {}
    yield kept
    for processes in kept.values():
        processes.stop()


@pytest.mark.parametrize("case", [name for name in cases_in(PROGRAM) if not name.startswith("then_")])
@pytest.mark.parametrize("world", WORLDS)  # case after case on the same processes: they take seconds to start
def test_on_several_processes(case, world, running, tmp_path_factory):
    if world not in running:
        for other in list(running):  # few are to wait while others work
            running.pop(other).stop()
        running[world] = Processes(PROGRAM, world, tmp_path_factory.mktemp("ranks"))
    processes = running.pop(world)
    processes.expect(case)
    running[world] = processes


def test_a_checkpoint_goes_on_with_other_numbers_of_processes(tmp_path):
    """Saved on two, it is loaded on four, on one and on two, and trains on with the same bits."""
    first, *others = (2, 4, 1, 2) if ON_CPU else (1, 1)
    for world, case in ((first, "then_saves"), *((other, "then_resumes") for other in others)):
        processes = Processes(PROGRAM, world, tmp_path)
        try:
            processes.expect(case)
        finally:
            processes.stop()
        (tmp_path / f"meet of {world}").unlink(missing_ok=True)
