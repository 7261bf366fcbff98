"""L-BFGS on a GPU is L-BFGS on the CPU: its sums are taken in double on both, in one fixed order for float32 rows."""

import copy

import pytest
import torch

import optim_ext

SHAPES = ((3, 4), (5,), ())


def run(device, dtype, steps, **options):
    """The losses of some steps from a fixed start, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator, dtype=dtype).to(device).requires_grad_(True) for shape in SHAPES]
    optimizer = optim_ext.LBFGS(params, **options)

    def closure():
        optimizer.zero_grad()
        x = torch.cat([p.reshape(-1) for p in params])
        loss = (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)], optimizer


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_cpu(device, dtype, line_search_fn):
    options = {
        "lr": 1.0 if line_search_fn else 1e-3,
        "max_iter": 5,
        "history_size": 4,
        "line_search_fn": line_search_fn,
    }
    there, on_gpu = run(device, dtype, 4, **options)
    here, on_cpu = run("cpu", dtype, 4, **options)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(torch.tensor(there), torch.tensor(here), rtol=tolerance, atol=tolerance)
    states = [next(iter(optimizer.state.values())) for optimizer in (on_gpu, on_cpu)]
    assert states[0].keys() == states[1].keys() and states[0]["func_evals"] == states[1]["func_evals"]


@pytest.mark.only_where(torch.cuda.device_count() > 1, reason="there are several GPUs")
def test_on_a_device_that_is_not_current():
    """Each launch goes along a stream of the device that has its tensors."""
    assert torch.cuda.current_device() == 0
    losses = [
        run(place, torch.float64, 3, line_search_fn="strong_wolfe", max_iter=3)[0] for place in ("cuda:0", "cuda:1")
    ]
    assert losses[0] == losses[1]


def test_state_moves_to_the_cpu_and_back(device):
    _, on_gpu = run(device, torch.float64, 2, line_search_fn="strong_wolfe", max_iter=3)
    _, on_cpu = run("cpu", torch.float64, 0, line_search_fn="strong_wolfe", max_iter=3)
    on_cpu.load_state_dict(copy.deepcopy(on_gpu.state_dict()))
    state = next(iter(on_cpu.state.values()))
    assert all(row.device.type == "cpu" for row in (*state["old_dirs"], *state["old_stps"], state["d"]))
    on_gpu.load_state_dict(on_cpu.state_dict())
    assert next(iter(on_gpu.state.values()))["d"].device.type == device.type
