"""Modules of tests that cannot run here."""

from pathlib import Path

import pytest


class Absent(pytest.Module):
    """A module whose tests would all be skipped: imported, so that it is seen to be whole, and skipped as one."""

    why = ""

    def collect(self):
        assert self.obj is not None
        pytest.skip(self.why, allow_module_level=True)


def absent(path: Path, parent: pytest.Collector, why: str | None) -> pytest.Module | None:
    """What pytest_pycollect_makemodule gives: such a module if there is a reason, else nothing."""
    if why is None:
        return None
    module = Absent.from_parent(parent, path=path)
    module.why = why
    return module
