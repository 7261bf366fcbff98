"""higher, which unrolls steps by formulas of its own: it has to be told that a class has torch's."""

import higher
import pytest
import torch
from beside import assert_near, batches, loss_of, network

import optim_ext


def gradients_through_three_steps(package):
    model = network()
    optimizer = package.Adam(model.parameters(), lr=0.02)
    first, *others = batches()[:4]
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (unrolled, steps):
        for batch in others:
            steps.step(loss_of(unrolled, batch))
        loss_of(unrolled, first).backward()
    return [p.grad for p in model.parameters()]


def test_steps_are_unrolled_once_the_class_is_registered(monkeypatch):
    monkeypatch.setattr(higher.optim, "_opt_mapping", dict(higher.optim._opt_mapping))
    with pytest.raises(ValueError, match="not supported by higher"):
        gradients_through_three_steps(optim_ext)
    higher.register_optim(optim_ext.Adam, higher.optim.DifferentiableAdam)
    theirs = gradients_through_three_steps(torch.optim)
    assert theirs[0].any()
    assert_near(gradients_through_three_steps(optim_ext), theirs)
