"""Sharded parameters that are kept in other ways than torch's, on one, two and four processes, on a GPU on one: see
kept_dtensor_cases.py."""

from pathlib import Path

import pytest
from device import ON_CPU
from ranks import cases_in

PROGRAM = Path(__file__).with_name("kept_dtensor_cases.py")
WORLDS = (2, 4, 1) if ON_CPU else (1,)
ABOUT_THE_CPU = () if ON_CPU else ("rules_written_in_python_have_the_bits_of_the_built_in_one",)
CASES = [name for name in cases_in(PROGRAM) if not name.startswith("then_") and name not in ABOUT_THE_CPU]


@pytest.fixture(scope="module", params=WORLDS)  # all tests of one number first
def world(request):
    return request.param


@pytest.fixture(scope="module")
def saved(worlds):
    """A checkpoint is in the folder, of as many processes as come first."""
    worlds.expect(WORLDS[0], "then_saves")


@pytest.mark.parametrize("case", CASES)
def test_on_several_processes(case, world, worlds):
    worlds.expect(world, case)


def test_a_checkpoint_goes_on_with_other_numbers_of_processes(world, saved, worlds):
    worlds.expect(world, "then_resumes")
