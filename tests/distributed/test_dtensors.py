"""DTensor parameters on one, two and four processes of one machine (gloo), on a GPU on one: see dtensor_cases.py."""

from pathlib import Path

import pytest
from device import ON_CPU
from ranks import Processes, cases_in

PROGRAM = Path(__file__).with_name("dtensor_cases.py")
WORLDS = (2, 4, 1) if ON_CPU else (1,)
CASES = [name for name in cases_in(PROGRAM) if not name.startswith("then_")]


@pytest.fixture(scope="module", params=WORLDS)  # all tests of one number first: processes take seconds to start
def world(request):
    return request.param


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A function that gives the processes of a number, those that the last case has left in order if they are as many."""
    folder, kept = tmp_path_factory.mktemp("ranks"), []

    def processes(world):
        if not kept or kept[0].world != world or kept[0].stopped:
            while kept:  # few are to wait while others work
                kept.pop().stop()
            kept.append(Processes(PROGRAM, world, folder))
        return kept[0]

    yield processes
    while kept:
        kept.pop().stop()


@pytest.fixture(scope="module")
def saved(running):
    """A checkpoint is in the folder, of as many processes as come first."""
    running(WORLDS[0]).expect("then_saves")


@pytest.mark.parametrize("case", CASES)
def test_on_several_processes(case, world, running):
    running(world).expect(case)


def test_a_checkpoint_goes_on_with_other_numbers_of_processes(world, saved, running):
    """It trains on with the same bits."""
    running(world).expect("then_resumes")
