"""What every test shares: the rows of specs.py as parameters, one thread per worker, repeatable random numbers."""

import gc
import os
import sys
from pathlib import Path

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: a thread that waits for others must not keep one. Read where torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Two lists of a thousand tensors' bits differ at an index, which pytest says. Where these are set it compares the lists as
# texts too, which takes longer than all the tests; verbosity_assertions in pyproject.toml is for -v.
os.environ.pop("CI", None)
os.environ.pop("BUILD_NUMBER", None)

# Rules written in Python are not compiled beside the tests; those about compiling say so.
os.environ.setdefault("OPTIM_EXT_RULES", "interpreted")

import torch

sys.path.insert(0, str(Path(__file__).parent))

from device import ON_CPU, put_test_tensors_there, seed_all
from forked import Forked
from specs import SPECS, VARIANTS, Spec, cases

import optim_ext

put_test_tensors_there()

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("suite")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; tests about threads set their own number


def parametrized(mark):
    names = mark.args[0]
    return names.replace(",", " ").split() if isinstance(names, str) else names


def pytest_generate_tests(metafunc):
    """A test that takes `spec` runs once per optimizer, `case` once per option set of each, `variant` once per kind of
    state, `counting` once per variant that counts steps. Marked `torchs`, it runs for those that torch has a class for;
    marked `only_for`, for those whose spec fulfils the condition: what a test is not about is no row of it. A test may
    also name its own rows, with pytest's mark."""
    rows = {
        "spec": SPECS,
        "case": cases(),
        "variant": VARIANTS,
        "counting": [variant for variant in VARIANTS if "step" in variant.spec.state(variant.options)],
    }
    torchs_only = metafunc.definition.get_closest_marker("torchs") is not None
    conditions = [mark.args[0] for mark in metafunc.definition.iter_markers("only_for")]
    own = [name for mark in metafunc.definition.iter_markers("parametrize") for name in parametrized(mark)]
    for name in rows.keys() & set(metafunc.fixturenames) - set(own):
        specs = ((row, getattr(row, "spec", row)) for row in rows[name])
        chosen = [
            row for row, spec in specs if (spec.in_torch or not torchs_only) and all(fits(spec) for fits in conditions)
        ]
        metafunc.parametrize(name, chosen, ids=[row.id for row in chosen])


def pytest_collection_modifyitems(config, items):
    """Left out, not skipped: complex numbers for optimizers that do not take them, tests marked `only_where` elsewhere,
    tests marked `about_the_cpu` on another device. Of the rest, OPTIM_EXT_SHARD=i/n takes every n-th test, beginning with
    test i, so that n processes run them all."""
    index, count = map(int, os.environ.get("OPTIM_EXT_SHARD", "0/1").split("/"))

    def fits(item):
        if not ON_CPU and item.get_closest_marker("about_the_cpu"):
            return False
        if not all(mark.args[0] for mark in item.iter_markers("only_where")):
            return False
        params = item.callspec.params if hasattr(item, "callspec") else {}
        rows = [row for row in (getattr(value, "spec", value) for value in params.values()) if isinstance(row, Spec)]
        dtypes = [value for value in params.values() if isinstance(value, torch.dtype)]
        return all(row.takes(dtype) for row in rows for dtype in dtypes)

    chosen = [item for item in items if fits(item)][index::count]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def pytest_collection_finish():
    """What has been collected stays: the collector need not go through tens of thousands of tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def with_optim_ext():
    """Programs in forks of a process that has optim_ext imported."""
    forked = Forked("optim_ext", PYTHONPATH=str(Path(optim_ext.__file__).parents[1]))
    yield forked
    forked.stop()


@pytest.fixture(scope="module")
def one_cache_of_rules(tmp_path_factory):
    """What one test of a module has compiled is there for the others, and nothing that was there before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTIM_EXT_CACHE", str(tmp_path_factory.mktemp("rules") / "cache"))
        yield


@pytest.fixture(autouse=True)
def _like_the_first():
    """A test's random numbers, and what torch compiles for it, do not depend on those before it: all classes share the
    functions of a step, of which torch compiles eight kinds and then no more."""
    seed_all(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
