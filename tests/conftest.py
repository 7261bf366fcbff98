"""What every test shares: the rows of specs.py as parameters, one thread per worker, repeatable random numbers."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from specs import CASES, SPECS, VARIANTS

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; tests about threads set their own number


def pytest_generate_tests(metafunc):
    """A test that takes `spec` runs once per optimizer, `case` once per option set of each, `variant` once per kind of
    state, `counting` once per variant that counts steps."""
    rows = {
        "spec": SPECS,
        "case": CASES,
        "variant": VARIANTS,
        "counting": [variant for variant in VARIANTS if "step" in variant.spec.state(variant.options)],
    }
    for name in rows.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, rows[name], ids=[row.id for row in rows[name]])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
