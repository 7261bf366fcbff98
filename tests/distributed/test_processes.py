"""DDP, FSDP, ZeRO and distributed checkpoints on two processes of one machine (gloo): see cases.py."""

from pathlib import Path

import pytest
from ranks import Processes, cases_in

PROGRAM = Path(__file__).with_name("cases.py")


@pytest.fixture(scope="module")
def running():
    """The processes that the last case has left in order, if any."""
    kept = []
    yield kept
    for processes in kept:
        processes.stop()


@pytest.mark.parametrize("case", cases_in(PROGRAM))
def test_on_two_processes(case, running, tmp_path):
    processes = running.pop() if running else Processes(PROGRAM, 2, tmp_path)
    processes.expect(case)
    running.append(processes)
