"""LBFGS over DTensor parameters on one, two and four processes of one machine (gloo): see lbfgs_cases.py."""

from pathlib import Path

import pytest
from ranks import cases_in

PROGRAM = Path(__file__).with_name("lbfgs_cases.py")


@pytest.fixture(scope="module", params=[2, 4, 1])  # all tests of one number first
def world(request):
    return request.param


@pytest.mark.about_the_cpu
@pytest.mark.parametrize("case", cases_in(PROGRAM))
def test_on_several_processes(case, world, worlds):
    worlds.expect(world, case)
