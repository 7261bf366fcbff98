"""The processes on which the cases of a module's PROGRAM run."""

import pytest
from ranks import Worlds


@pytest.fixture(scope="module")
def worlds(request, tmp_path_factory):
    worlds = Worlds(request.module.PROGRAM, tmp_path_factory.mktemp("ranks"))
    yield worlds
    worlds.stop()
