"""DDP, FSDP, ZeRO and distributed checkpoints on two processes of one machine (gloo), on a GPU on one: see cases.py."""

from pathlib import Path

import pytest
from device import ON_CPU
from ranks import cases_in

PROGRAM = Path(__file__).with_name("cases.py")
WORLD = 2 if ON_CPU else 1

ABOUT_THE_CPU = {"checkpoints_of_kept_state": "precision options are for parameters there"}
CASES = [
    pytest.param(name, marks=[pytest.mark.about_the_cpu(ABOUT_THE_CPU[name])] if name in ABOUT_THE_CPU else [])
    for name in cases_in(PROGRAM)
]


@pytest.mark.parametrize("case", CASES)
def test_on_processes(case, worlds):
    worlds.expect(WORLD, case)
