"""What optim_ext.LBFGS can do that torch's cannot: groups, budgets, recovery, damping, a 16-bit history, bounds."""

import copy
import inspect
import math
import pickle
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from scipy import optimize

sys.path.insert(0, str(Path(__file__).parent))

from problems import Run, beale, booth, himmelblau, rosenbrock, rosenbrock_start, start

from optim_ext import LBFGS
from optim_ext.swa_utils import AveragedModel

WOLFE = {"line_search_fn": "strong_wolfe"}


def vector(at, **options):
    """A run over one float64 vector; the objective is set afterwards."""
    param = torch.nn.Parameter(torch.tensor(at, dtype=torch.float64))
    return lambda loss: Run(LBFGS([param], **options), [param], lambda params: loss(params[0]))


def test_signature_and_defaults_are_torchs():
    theirs = list(inspect.signature(torch.optim.LBFGS).parameters)
    ours = list(inspect.signature(LBFGS).parameters)
    assert ours[: len(theirs)] == theirs
    assert LBFGS([torch.zeros(1)]).defaults == torch.optim.LBFGS([torch.zeros(1)]).defaults
    assert isinstance(LBFGS([torch.zeros(1)]), torch.optim.LBFGS) and LBFGS.__name__ == "LBFGS"
    repr(LBFGS([torch.zeros(1)], damping=0.2))


def test_options_survive_checkpoints_of_torch_and_copies():
    optimizer = LBFGS([torch.zeros(3)], recover=True, history_dtype=torch.bfloat16, lr=0.5)
    assert optimizer.param_groups[0]["recover"] and optimizer.param_groups[0]["history_dtype"] == torch.bfloat16
    optimizer.load_state_dict(torch.optim.LBFGS([torch.zeros(3)], lr=0.25).state_dict())
    for found in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        group = found.param_groups[0]
        assert group["recover"] and group["history_dtype"] == torch.bfloat16 and group["lr"] == 0.25


# Controls, which it shares with the other optimizers where they make sense


def test_clipping_is_refused_in_one_sentence():
    optimizer = LBFGS([torch.zeros(2, requires_grad=True)])
    for ask in (lambda: optimizer.clip_grad_norm(1.0), lambda: optimizer.set_grad_policy(max_norm=1.0)):
        with pytest.raises(RuntimeError, match="LBFGS does not clip"):
            ask()
    assert optimizer.grad_policy is None


@pytest.mark.parametrize("policy", [{"skip_nonfinite": True}, {"skip_above": 1e4, "norm_type": 1.0}], ids=str)
@pytest.mark.parametrize("options", [{}, WOLFE, {"bounds": (-1.0, 2.0), **WOLFE}], ids=["fixed", "wolfe", "bounded"])
def test_a_skipped_step_writes_nothing(options, policy):
    run = start(LBFGS, "rosenbrock-10", max_iter=3, **options).steps(1)
    run.optimizer.set_grad_policy(**policy)
    run.steps(1)
    assert not run.optimizer.grad_policy.last_step_skipped
    with torch.no_grad():
        run.params[0][0] = 7.0  # out of bounds
    params, state = run.params[0].detach().clone(), copy.deepcopy(run.optimizer.state_dict()["state"])
    loss, calls = run.loss, run.calls
    run.loss = lambda params: loss(params) * math.inf
    run.steps(1)
    assert run.calls == calls + 1 and torch.equal(run.params[0], params)
    assert repr(run.optimizer.state_dict()["state"]) == repr(state)
    assert run.optimizer.grad_policy.last_step_skipped and run.optimizer.grad_policy.skipped_steps == 1
    run.loss = lambda params: 1e-3 * loss(params)
    run.steps(1)
    assert not run.optimizer.grad_policy.last_step_skipped and not torch.equal(run.params[0], params)
    assert copy.deepcopy(run.optimizer).grad_policy.skipped_steps == 1
    run.optimizer.set_grad_policy()
    assert run.optimizer.grad_policy is None


def test_steps_are_averaged_and_measured():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    averages, given = [], torch.randn(5, 3)
    for one, in_step in ((model, True), (twin, False)):
        averaged = AveragedModel(one)
        optimizer = LBFGS(one.parameters(), max_iter=3, **WOLFE)
        if in_step:
            optimizer.average_into(averaged)

        def closure(one=one, optimizer=optimizer):
            optimizer.zero_grad()
            loss = one(given).sin().square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            with optimizer.measure_step() as norms:
                optimizer.step(closure)
            assert norms[0].update > 0 and norms[0].param > 0
            if not in_step:
                averaged.update_parameters(one)
        averages.append(averaged)
    assert averages[0].n_averaged == averages[1].n_averaged == 3
    for ours, other in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        assert torch.equal(ours, other)
    model.weight.grad[0, 0] = math.nan
    optimizer = LBFGS(model.named_parameters())
    assert [(found.grad, found.value) for found in optimizer.find_nonfinite()] == [(1, 0)]


# Groups


def two_groups(rates, **options):
    params = [torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in ([-1.2, 1.0], [0.5, -0.7, 0.3])]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
    return Run(LBFGS(groups, **options), params, lambda ps: rosenbrock(torch.cat(ps)) + ps[1].pow(4).sum())


@pytest.mark.parametrize("options", [{"lr": 0.02}, WOLFE], ids=["fixed", "wolfe"])
def test_groups_of_one_rate_are_one_group(options):
    grouped = two_groups((0.02, 0.02), **options).steps(3)
    whole = two_groups((0.02, 0.02), **options)
    whole.optimizer = LBFGS(whole.params, **{**options, "lr": 0.02})
    assert whole.steps(3).losses == grouped.losses


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_rates_of_groups_scale_the_variables(line_search_fn):
    """L-BFGS with lr r_i is L-BFGS in variables divided by sqrt(r_i / r)."""
    # A small gradient: the first step is otherwise measured against its sum, which is another in scaled variables.
    rates, largest = (0.5, 0.125), 0.5
    options = {"line_search_fn": line_search_fn, "max_iter": 6, "history_size": 4}
    options |= {"tolerance_change": 0, "tolerance_grad": 0}
    run = two_groups(rates, **options)
    loss = run.loss
    run.loss = lambda ps: 1e-3 * loss(ps)
    roots = [math.sqrt(rate / largest) for rate in rates]
    params = [torch.nn.Parameter(p.detach() / root) for p, root in zip(run.params, roots, strict=True)]
    scaled = Run(
        torch.optim.LBFGS(params, lr=largest, **options),
        params,
        lambda ps: run.loss([p * root for p, root in zip(ps, roots, strict=True)]),
    )
    assert run.steps(3).losses == pytest.approx(scaled.steps(3).losses, rel=1e-6)
    assert len(run.losses) >= 15


def test_a_group_of_rate_zero_stays():
    run = two_groups((0.02, 0.0), **WOLFE)
    before = run.params[1].detach().clone()
    run.steps(5)
    assert torch.equal(run.params[1], before) and run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("options", [{}, {"bounds": (-2.0, 2.0)}], ids=["free", "bounded"])
def test_a_group_whose_rate_becomes_zero_stays(options):
    """Its part of earlier steps is in the history."""
    run = two_groups((0.02, 0.02), max_iter=4, **options).steps(3)
    run.optimizer.param_groups[1]["lr"] = 0.0
    before, loss = run.params[1].detach().clone(), run.losses[-1]
    run.steps(3)
    assert torch.equal(run.params[1], before) and run.losses[-1] < loss


def test_a_schedule_of_one_groups_rate():
    run = two_groups((0.02, 0.02), max_iter=3).steps(2)
    run.optimizer.param_groups[1]["lr"] = 0.002
    run.steps(2)
    assert all(map(math.isfinite, run.losses))


def test_add_param_group():
    run = start(LBFGS, "rosenbrock-10", **WOLFE)
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    run.optimizer.add_param_group({"params": [other], "lr": 0.5})
    run.steps(1)
    assert run.state["d"].numel() == 13


def test_groups_share_the_method():
    params = [torch.zeros(1), torch.zeros(1)]
    with pytest.raises(ValueError, match="same max_iter"):
        LBFGS([{"params": params[:1], "max_iter": 3}, {"params": params[1:]}])


# Budgets


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("max_eval", [1, 2, 3, 5, 8, 13])
def test_strict_max_eval(max_eval, line_search_fn):
    for problem in ("rosenbrock-2", "beale", "himmelblau"):
        run = start(
            LBFGS, problem, max_iter=20, max_eval=max_eval, line_search_fn=line_search_fn, strict_max_eval=True, lr=1e-3
        )
        for _ in range(5):
            before = run.calls
            run.steps(1)
            assert 1 <= run.calls - before <= max_eval


# Recovery


def explosive(x):
    """Overflows to infinity and then NaN a little away from the minimum: the log of pytorch issue 5953's kind."""
    return (torch.exp(6 * x) - 12 * x).sum() + torch.sqrt(2 - x).sum() * 0


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize(
    ("loss", "at"),
    [
        (lambda x: (torch.exp(x) - 20 * x).sum(), [-30.0, 0.0, 5.0]),  # overflows beyond 709
        (lambda x: -torch.log(x).sum() + (x**2).sum(), [1e-3, 5.0]),  # NaN where x is negative
        (lambda x: (x.abs() ** 0.5).sum() + rosenbrock(x), [3.0, 3.0, -4.0]),  # steep at zero
        (explosive, [1.5, -3.0]),
    ],
    ids=["overflow", "log", "root", "sqrt"],
)
def test_recover(loss, at, line_search_fn):
    run = vector(at, recover=True, lr=1.0, line_search_fn=line_search_fn)(loss)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.steps(20)
    assert len([w for w in caught if "not finite" in str(w.message)]) <= 1
    final = loss(run.params[0].detach())
    assert torch.isfinite(final) and torch.isfinite(run.params[0]).all()
    assert final <= run.losses[0]


def test_recover_says_so_once_and_finds_the_minimum():
    def loss(x):
        return (-torch.log(x) + x).sum()

    run = vector([1e-4, 8.0], recover=True)(loss)
    with pytest.warns(UserWarning, match="not finite") as caught:
        run.steps(30)
    assert len(caught) == 1
    torch.testing.assert_close(run.params[0].detach(), torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_recover_says_so_once_though_rates_change():
    params = [torch.nn.Parameter(torch.tensor([1e-4, 8.0], dtype=torch.float64)) for _ in range(2)]
    groups = [{"params": [p], "lr": 1.0} for p in params]
    run = Run(LBFGS(groups, recover=True), params, lambda ps: sum((-torch.log(p) + p).sum() for p in ps))
    with pytest.warns(UserWarning, match="not finite") as caught:
        for step in range(5):
            run.optimizer.param_groups[1]["lr"] = 1.0 / (step + 1)
            run.steps(1)
            with torch.no_grad():
                params[0].copy_(torch.tensor([1e-4, 8.0]))
    assert len(caught) == 1


def test_without_recover_as_torch():
    """The same run ends in NaN in torch and, without the option, here."""
    for cls in (torch.optim.LBFGS, LBFGS):
        param = torch.nn.Parameter(torch.tensor([1e-4, 8.0], dtype=torch.float64))
        run = Run(cls([param]), [param], lambda ps: (-torch.log(ps[0]) + ps[0]).sum()).steps(10)
        assert not torch.isfinite(run.params[0]).all() or math.isnan(run.losses[-1])


def test_recover_from_a_step_that_was_not_evaluated():
    """With max_iter=1 the closure is first called at the bad point in the step after."""
    run = vector([1e-4, 8.0], recover=True, max_iter=1)(lambda x: (-torch.log(x) + x).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.steps(60)
    assert torch.isfinite(run.params[0]).all()
    assert run.loss(run.params) < run.losses[0]


def test_a_restart_survives_a_checkpoint_of_torch():
    """After it the next step begins as short as a first one, and ten times shorter than the one that led astray."""

    def loss(x):
        return 10 * (-torch.log(x) + x).sum()

    run = vector([1e-4, 8.0], recover=True, max_iter=2, max_eval=2)(loss)
    with pytest.warns(UserWarning, match="not finite"):
        while "t" not in run.state or run.state["t"] != 0.0:
            run.steps(1)
    through = torch.optim.LBFGS([run.params[0].detach().clone()])
    through.load_state_dict(run.optimizer.state_dict())
    param = torch.nn.Parameter(run.params[0].detach().clone())
    again = Run(LBFGS([param], recover=True), [param], run.loss)
    again.optimizer.load_state_dict(through.state_dict())
    before = param.detach().clone()
    grad = 10 * (1 - 1 / before)
    tried = before - 0.1 ** run.state["restarts"] * grad / grad.abs().sum()
    assert grad.abs().sum() > 1
    again.steps(1)
    assert again.losses[1] == pytest.approx(loss(tried).item(), rel=1e-12)


def test_recover_from_slopes_beyond_single_precision():
    param = torch.nn.Parameter(torch.tensor([1e5, -3e4]))
    run = Run(LBFGS([param], recover=True, **WOLFE), [param], lambda ps: 1e15 * (ps[0] ** 2).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.steps(3)
    assert run.losses[-1] < 1e-6 * run.losses[0]


def test_recover_from_a_bad_start_leaves_everything():
    run = vector([-1.0], recover=True)(lambda x: torch.log(x).sum())
    with pytest.warns(UserWarning, match="where it began"):
        run.steps(1)
    assert run.params[0].item() == -1.0


@pytest.mark.parametrize("lr", [2.5, 8.0, 1000.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_iter": 1}, {"max_iter": 3, "max_eval": 3, "strict_max_eval": True}, {"damping": 0.2}, {"bounds": (-9, 9)},
     WOLFE, {"bounds": (-9, 9), **WOLFE}],
    ids=["fixed", "one", "strict", "damped", "bounded", "wolfe", "bounded wolfe"],
)  # fmt: skip
@pytest.mark.parametrize("problem", ["rosenbrock-10", "beale", "himmelblau", "logistic"])
def test_every_step_ends_at_the_best_point_it_has_seen(problem, options, lr):
    """Rates far too high, with finite losses: steps get shorter until the loss falls, however few a step may try."""
    run = start(LBFGS, problem, lr=lr, recover=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            before = run.calls
            run.steps(1)
            assert run.loss(run.params).item() == min(run.losses[before:])
    assert run.loss(run.params).item() < 0.99 * run.losses[0]


def test_what_shortens_a_step_is_saved_with_the_state():
    run = start(LBFGS, "rosenbrock-2", lr=1000.0, recover=True, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.steps(2)
        assert run.state["restarts"] == 2
        again = start(LBFGS, "rosenbrock-2", lr=1000.0, recover=True, max_iter=1)
        again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        before = run.calls
        assert run.steps(3).losses[before:] == again.steps(3).losses
        kept = ["restarts" in run.steps(1).state for _ in range(8)]
    assert not all(kept) and min(run.losses) < run.losses[0]


def test_a_step_of_one_evaluation_cannot_recover():
    with pytest.raises(ValueError, match="a step needs 2"):
        LBFGS([torch.zeros(1)], recover=True, strict_max_eval=True, max_eval=1)


# Damping


def test_damped_pairs_keep_the_history_positive():
    """On a function with negative curvature a fixed step gives pairs that torch drops and damping mends."""

    def loss(x):
        return torch.cos(2 * x).sum() + 0.1 * (x**4).sum()

    kept = {}
    for damping in (None, 0.2):
        run = vector([0.1, 0.2, -0.15], lr=0.1, damping=damping, max_iter=1)(loss).steps(12)
        pairs = zip(run.state["old_dirs"], run.state["old_stps"], strict=True)
        kept[damping] = [float(y @ s) for y, s in pairs]
    assert len(kept[0.2]) == 11 and min(kept[0.2]) > 0
    assert len(kept[None]) < 11


def test_damping_is_powells():
    """One damped pair by hand: B s = -t g before."""
    run = vector([1.0], lr=0.4, damping=0.2, max_iter=1)(lambda x: -(x**2).sum() + 0.1 * (x**4).sum())
    run.steps(1)
    before, d, t = (run.state[k] if k == "t" else run.state[k].clone() for k in ("prev_flat_grad", "d", "t"))
    run.steps(1)
    s, grad = t * d, run.state["prev_flat_grad"]
    y, bs = grad - before, -t * before
    sy, sbs = float(s @ y), float(s @ bs)
    assert sy < 0.2 * sbs
    theta = 0.8 * sbs / (sbs - sy)
    torch.testing.assert_close(run.state["old_dirs"][0], theta * y + (1 - theta) * bs)
    assert float(run.state["old_dirs"][0] @ s) == pytest.approx(0.2 * sbs)


# A history of 16 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bfloat16_history(dtype):
    run = start(LBFGS, "rosenbrock-100", dtype, history_dtype=torch.bfloat16, max_iter=400, max_eval=500, **WOLFE)
    run.steps(3)
    assert all(row.dtype == torch.bfloat16 for row in (*run.state["old_dirs"], *run.state["old_stps"]))
    assert run.state["d"].dtype == dtype
    exact = start(LBFGS, "rosenbrock-100", dtype, max_iter=400, max_eval=500, **WOLFE).steps(3)
    assert run.losses[-1] < 20 and min(run.losses) < run.losses[0] / 1000
    noise = 1e-8 if dtype == torch.float32 else 0.0
    assert exact.losses[-1] <= run.losses[-1] + noise


def test_bfloat16_history_survives_a_checkpoint():
    run = start(LBFGS, "rosenbrock-10", history_dtype=torch.bfloat16, max_iter=5, **WOLFE).steps(2)
    param = torch.nn.Parameter(run.params[0].detach().clone())
    again = Run(LBFGS([param], history_dtype=torch.bfloat16), [param], run.loss)
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert again.state["old_dirs"][0].dtype == torch.bfloat16
    before = len(run.losses)
    assert run.steps(2).losses[before:] == again.steps(2).losses
    theirs = torch.nn.Parameter(param.detach().clone())
    torchs = Run(torch.optim.LBFGS([theirs]), [theirs], run.loss)
    torchs.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    torchs.steps(1)  # torch casts the rows and goes on


def test_float_history_of_half_parameters_survives_a_checkpoint():
    param = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    run = Run(LBFGS([param], max_iter=3, **WOLFE), [param], lambda ps: ((ps[0].float() - 3) ** 4).sum()).steps(2)
    other = LBFGS([torch.nn.Parameter(param.detach().clone())])
    other.load_state_dict(run.optimizer.state_dict())
    loaded = other.state[other.param_groups[0]["params"][0]]
    assert loaded["d"].dtype == torch.float32 and torch.equal(loaded["d"], run.state["d"])


# Bounds, beside SciPy's L-BFGS-B

BOXES = [
    (rosenbrock, [-1.2, 1.0], (-2.0, 0.5)),
    (rosenbrock, rosenbrock_start(10).tolist(), (-0.5, 0.8)),
    (rosenbrock, rosenbrock_start(50).tolist(), (None, 0.9)),
    (rosenbrock, [4.0, 4.0, 4.0], (1.5, 10.0)),
    (beale, [1.0, 1.0], (-4.5, 2.5)),
    (booth, [-4.0, 9.0], (-10.0, 1.5)),
    (himmelblau, [0.0, 0.0], (0.0, 2.5)),
    (lambda x: ((x - torch.arange(len(x))) ** 2).sum() + (x[1:] * x[:-1]).sum() * 0.4, [0.0] * 30, (1.0, 6.0)),
    (lambda x: (x**4 - 3 * x).sum() + (x.sum() - 1) ** 2, [0.2] * 20, (0.0, 0.6)),
]


def driver1(x):
    """The test function of L-BFGS-B's own first driver (Zhu, Byrd, Lu & Nocedal 1997)."""
    return 4 * (0.25 * (x[0] - 1) ** 2 + ((x[1:] - x[:-1] ** 2) ** 2).sum())


def driver1_bounds(n):
    lower = torch.where(torch.arange(n) % 2 == 0, 1.0, -100.0).double()
    return lower, torch.full((n,), 100.0, dtype=torch.float64)


@pytest.mark.parametrize("line_search_fn", ["strong_wolfe"])
@pytest.mark.parametrize("index", range(len(BOXES) + 1))
def test_bounds_beside_scipy(index, line_search_fn):
    if index < len(BOXES):
        loss, at, (lower, upper) = BOXES[index]
        pairs = [(lower, upper)] * len(at)
    else:
        loss, at = driver1, [3.0] * 25
        lower, upper = driver1_bounds(25)
        pairs = list(zip(lower.tolist(), upper.tolist(), strict=True))
        lower, upper = [lower], [upper]

    def numbers(x):
        x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        value = loss(x)
        (grad,) = torch.autograd.grad(value, x)
        return value.item(), grad.cpu().numpy()

    expected = optimize.minimize(
        numbers, numpy.array(at), jac=True, bounds=pairs, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    run = vector(at, bounds=(lower, upper), max_iter=500, max_eval=1000, tolerance_change=1e-14, tolerance_grad=1e-9,
                 line_search_fn=line_search_fn)(loss)  # fmt: skip
    inside = []

    plain = run.closure

    def closure():
        x = run.params[0].tolist()
        inside.append(
            all((lo is None or v >= lo) and (hi is None or v <= hi) for v, (lo, hi) in zip(x, pairs, strict=True))
        )
        return plain()

    for _ in range(3):
        run.optimizer.step(closure)
    assert all(inside)
    assert run.losses[-1] <= expected.fun + 1e-7 * max(1.0, abs(expected.fun)), (run.losses[-1], expected.fun)
    assert run.calls <= 4 * expected.nfev + 40


def test_bounds_per_parameter_and_fixed_steps():
    params = [torch.nn.Parameter(torch.full((2, 2), 3.0)), torch.nn.Parameter(torch.tensor(-1.0))]
    bounds = ([torch.full((2, 2), 0.5), None], [None, -0.25])
    run = Run(LBFGS(params, lr=0.1, bounds=bounds, max_iter=50), params, lambda ps: sum((p**2).sum() for p in ps))
    run.steps(5)
    torch.testing.assert_close(params[0].detach(), torch.full((2, 2), 0.5))
    torch.testing.assert_close(params[1].detach(), torch.tensor(-0.25))


@pytest.mark.parametrize("options", [{"lr": 0.1}, WOLFE], ids=["fixed", "wolfe"])
@pytest.mark.parametrize("bounded", [0, 1])
def test_bounds_of_one_group(bounded, options):
    params = [torch.nn.Parameter(torch.full((2,), 3.0)) for _ in range(2)]
    groups = [{"params": [p]} for p in params]
    groups[bounded]["bounds"] = (0.5, None)
    run = Run(LBFGS(groups, max_iter=50, **options), params, lambda ps: sum((p**2).sum() for p in ps)).steps(5)
    torch.testing.assert_close(run.params[bounded].detach(), torch.full((2,), 0.5))
    torch.testing.assert_close(run.params[1 - bounded].detach(), torch.zeros(2), atol=1e-3, rtol=0)


def test_a_start_outside_is_brought_in():
    run = vector([5.0, -5.0], bounds=(-1.0, 1.0), **WOLFE)(lambda x: ((x - 0.5) ** 2).sum())
    run.steps(3)
    assert run.losses[0] == pytest.approx(0.25 + 2.25)
    torch.testing.assert_close(run.params[0].detach(), torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("bounds", "words"),
    [((1.0, 0.0), "above"), ((0.0,), "expected"), (([0.0, 0.0], None), "2 of them"), ((float("nan"), None), "NaN")],
)
def test_bad_bounds(bounds, words):
    run = vector([5.0], bounds=bounds)(lambda x: (x**2).sum())
    with pytest.raises(ValueError, match=words):
        run.steps(1)
    assert run.params[0].item() == 5.0 and run.calls == 0


def test_bounds_changed_in_place():
    param = torch.nn.Parameter(torch.zeros(2))
    lower = torch.tensor([-1.0, -1.0])
    run = Run(LBFGS([param], bounds=(lower, None)), [param], lambda ps: ((ps[0] + 5) ** 2).sum()).steps(2)
    assert torch.equal(param, lower)
    lower.fill_(-3.0)
    run.steps(2)
    assert torch.equal(param, torch.full((2,), -3.0))
