"""Sharded parameters that are kept in other ways than torch's, on one, two and four processes: see kept_dtensor_cases.py."""

from pathlib import Path

import pytest
from ranks import cases_in

PROGRAM = Path(__file__).with_name("kept_dtensor_cases.py")
CASES = [name for name in cases_in(PROGRAM) if not name.startswith("then_")]


@pytest.fixture(scope="module", params=[2, 4, 1])  # all tests of one number first
def world(request):
    return request.param


@pytest.fixture(scope="module")
def saved(worlds):
    """A checkpoint is in the folder, of as many processes as come first."""
    worlds.expect(2, "then_saves")


@pytest.mark.parametrize("case", CASES)
def test_on_several_processes(case, world, worlds):
    worlds.expect(world, case)


def test_a_checkpoint_goes_on_with_other_numbers_of_processes(world, saved, worlds):
    worlds.expect(world, "then_resumes")
