"""The schemas of all ops, word for word: compiled graphs and exported programs hold on to them."""

import json
from pathlib import Path

import pytest
import torch

from optim_ext import _C

RECORD = json.loads(Path(__file__).with_suffix(".json").read_text())


@pytest.mark.parametrize("op", RECORD)
def test_schema_is_the_recorded_one(op):
    assert str(getattr(torch.ops.optim_ext, op).default._schema) == RECORD[op]


def test_every_op_that_steps_has_a_recorded_schema():
    assert set(_C.step_ops()) <= RECORD.keys()
