"""Which of the tests here are about the CPU alone: those of classes whose state is kept in other ways there only."""

import pytest

import optim_ext
from optim_ext._tables import TABLES


def op_of(value):
    """The op of a class that a test is run with, by itself, its specification or its name; else None."""
    found = getattr(optim_ext, value, None) if isinstance(value, str) else value
    return getattr(found, "op", None) or getattr(found, "_op", None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "/precision/" not in str(item.path) or not hasattr(item, "callspec"):
            continue
        ops = {op_of(value) for value in item.callspec.params.values()} & set(TABLES)
        if not all(TABLES[op].companions_on_gpu for op in ops):
            item.add_marker(pytest.mark.about_the_cpu("what the class keeps in other ways is there only"))
