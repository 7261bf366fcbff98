"""Averages that follow within a step on a GPU: the CPU's bits, skipped where a step is, and nothing is waited for."""

import math

import pytest
import torch
from lockstep import bits, copy_of, give_grads, make_params

from optim_ext import swa_utils

KINDS = {
    "mean": {},
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "warm-up": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(swa_utils.get_warmup_decay(0.99))},
}
FIRST_STEPS = 2  # which make state and plans; torch's code for it waits (ASGD, Rprop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skips", [False, True], ids=["every step", "skipping"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cpus_bits(spec, kind, skips, dtype, device, no_sync):
    finals = []
    for place in (torch.device("cpu"), device):
        model = torch.nn.ParameterList(make_params(dtype=dtype, device=place))
        averaged = swa_utils.AveragedModel(model, device=place, **KINDS[kind])
        params = list(model)
        optimizer = spec.ours(params, **copy_of({**spec.typical, **spec.half_options}))
        optimizer.average_into(averaged, model)
        if skips:
            optimizer.set_grad_policy(skip_nonfinite=True)
        for step in range(5):
            give_grads(params, step)
            if step == 3 and skips:
                params[4].grad[1, 2] = math.nan
            if place.type == "cpu" or step < FIRST_STEPS:
                optimizer.step()
            else:
                with no_sync:
                    optimizer.step()
        assert averaged.n_averaged == (4 if skips else 5)
        finals.append([bits(tensor) for tensor in (*params, *averaged.module)])
    assert finals[1] == finals[0]
