"""Sharded parameters that are kept in other ways than torch's, on one, two and four processes: see kept_dtensor_cases.py."""

from pathlib import Path

import pytest
from ranks import Processes, cases_in

PROGRAM = Path(__file__).with_name("kept_dtensor_cases.py")
pytestmark = pytest.mark.about_the_cpu("precision options are for parameters there")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_on_several_processes(world, tmp_path):
    """One case after the other on the same processes, which take seconds to start."""
    processes = Processes(PROGRAM, world, tmp_path)
    try:
        for case in cases_in(PROGRAM):
            if not case.startswith("then_"):
                processes.expect(case)
    finally:
        processes.stop()


def test_a_checkpoint_goes_on_with_other_numbers_of_processes(tmp_path):
    """Saved on two, it is loaded on four and on one."""
    for world, case in ((2, "then_saves"), (4, "then_resumes"), (1, "then_resumes")):
        processes = Processes(PROGRAM, world, tmp_path)
        try:
            processes.expect(case)
        finally:
            processes.stop()
