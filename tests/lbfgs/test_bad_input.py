"""Bad input is found before anything is written, and the optimizer works once it is mended."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from problems import rosenbrock, start

from optim_ext import LBFGS, explain

WOLFE = {"line_search_fn": "strong_wolfe"}


def given_params():
    """Arguments of the constructor that torch refuses, and some that it takes."""
    p, q = (torch.nn.Parameter(torch.ones(1, 1)) for _ in range(2))
    return [
        p, [p, p], [{"params": p}, {"params": p}], None, [("weight", p), q],
        [{"params": [p], "lr": 1e-2}, {"params": [("weight", q)]}], (t for t in (p, q)), iter([]), [], {"params": [p]},
        {p}, [{"params": {p}}], "ab", 3, [3], [p, {"params": q}], [{"params": q}, p], [{"params": [p]}], [{"lr": 1.0}],
        [{"params": [p]}, {"lr": 0.1}], [[p]], [("a", p), ("b", q)], [p * 2], (g for g in ({"params": [p]},)),
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"lr": -1}, {"lr": torch.tensor([0.1, 0.2])}, {"typo": 1}], ids=str)
@pytest.mark.parametrize("index", range(len(given_params())))
def test_constructors_raise_what_torchs_does(index, options):
    """Options are looked at before params are."""
    raised = []
    for cls in (LBFGS, torch.optim.LBFGS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                cls(given_params()[index], **options)
                raised.append(None)
            except Exception as error:
                raised.append((type(error), str(error)))
    if "typo" in options:  # ours also says which options there are
        assert raised[0][0] is raised[1][0] is TypeError
        assert all("got an unexpected keyword argument 'typo'" in words for _, words in raised)
    else:
        assert raised[0] == raised[1]


def unchanged(run, act, error, words):
    params = [p.detach().clone() for p in run.params]
    state = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(error, match=words):
        act()
    assert all(torch.equal(a, b) for a, b in zip(params, run.params, strict=True))
    now = run.optimizer.state_dict()["state"]
    assert repr(now) == repr(state["state"])
    run.optimizer.param_groups[0].update(line_search_fn=None, history_size=10, lr=1e-3)
    run.steps(1)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("closure", "error", "words"),
    [
        (None, TypeError, "closure"),
        (3.0, TypeError, "closure"),
        (lambda: None, TypeError, "one number"),
        (lambda: torch.zeros(2), (RuntimeError, ValueError), "one number"),
        (lambda: "low", ValueError, "one number"),
    ],
    ids=["none", "number", "nothing", "two", "text"],
)
def test_closures(closure, error, words, steps):
    run = start(LBFGS, "rosenbrock-10", **WOLFE).steps(steps)
    unchanged(run, lambda: run.optimizer.step(closure), error, words)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        ({"line_search_fn": "armijo"}, RuntimeError, "only 'strong_wolfe' is supported"),
        ({"history_size": 0}, ValueError, "history_size"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"lr": float("nan")}, ValueError, "learning rate"),
        ({"history_dtype": torch.int8}, ValueError, "history_dtype"),
        ({"damping": 2.0}, ValueError, "damping"),
        ({"damping": 0}, ValueError, "damping"),
        ({"bounds": 0}, ValueError, "bounds"),
    ],
    ids=str,
)
def test_options_edited(edit, error, words, steps):
    run = start(LBFGS, "rosenbrock-10", lr=1e-3).steps(steps)
    group = run.optimizer.param_groups[0]
    before = dict(group)
    group.update(edit)
    calls = run.calls
    with pytest.raises(error, match=words):
        run.steps(1)
    assert run.calls == calls
    group.clear()
    group.update(before)
    run.steps(1)


@pytest.mark.parametrize(
    "options",
    [{"history_size": 0}, {"damping": -1.0}, {"damping": 0}, {"damping": 0.0}, {"damping": 0.2, "bounds": (0, 1)}],
    ids=str,
)
def test_options_at_construction(options):
    with pytest.raises(ValueError):
        LBFGS([torch.zeros(2)], **options)


def test_bounds_of_a_later_group_exclude_damping():
    groups = [{"params": [torch.zeros(2)]}, {"params": [torch.zeros(2)], "bounds": (0, 1)}]
    with pytest.raises(ValueError, match="cannot be combined"):
        LBFGS(groups, damping=0.2)


@pytest.mark.parametrize("bounds", [0, torch.tensor([0.0, 1.0])], ids=["number", "tensor"])
def test_bounds_that_are_no_pair(bounds):
    run = start(LBFGS, "rosenbrock-10", bounds=bounds)
    with pytest.raises(ValueError, match="bounds"):
        run.steps(1)
    assert run.calls == 0


def test_an_unknown_line_search_is_refused_by_the_step():
    for cls in (LBFGS, torch.optim.LBFGS):
        run = start(cls, "rosenbrock-10", line_search_fn="armijo")
        with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
            run.steps(1)


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_a_parameter_that_changed(change):
    run = start(LBFGS, "rosenbrock-10", **WOLFE).steps(2)
    param = run.params[0]
    kept, param.grad = param.data, None
    param.data = torch.zeros(7, dtype=torch.float64) if change == "shape" else kept.float()
    before = run.calls
    with pytest.raises(RuntimeError, match=r"parameter 0 changed from .* to .*state\.clear"):
        run.steps(1)
    assert run.calls == before
    param.data = kept
    run.steps(1)


def test_state_of_another_size():
    run = start(LBFGS, "rosenbrock-10", **WOLFE).steps(2)
    other = start(LBFGS, "rosenbrock-100", **WOLFE)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    with pytest.raises(RuntimeError, match="10 numbers .* have 100"):
        other.steps(1)
    other.optimizer.state.clear()
    other.steps(1)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        ({"old_dirs": [1.0, 2.0]}, TypeError, "'old_dirs' of LBFGS holds an object of type float, expected a tensor"),
        ({"old_stps": 3}, TypeError, "'old_stps' of LBFGS is of type int, expected a list"),
        ({"old_stps": []}, ValueError, "old_dirs but 0 old_stps"),
        ({"d": "along"}, TypeError, "'d' of LBFGS holds an object of type str, expected a tensor"),
        ({"prev_flat_grad": None}, ValueError, "no 'prev_flat_grad'"),
        (
            {"old_dirs": [torch.ones(3)] * 2, "old_stps": [torch.ones(3)] * 2},
            RuntimeError,
            r"'old_dirs' .* shape \[3\], the parameters have 10",
        ),
        ({"d": torch.ones(3)}, RuntimeError, r"'d' .* shape \[3\], the parameters have 10"),
    ],
    ids=str,
)
def test_state_edited(edit, error, words):
    """It is found before a parameter moves, and mended by putting back what was there."""
    run, whole = (start(LBFGS, "rosenbrock-10", lr=1e-3, max_iter=2).steps(2) for _ in range(2))
    before, at = dict(run.state), run.params[0].detach().clone()
    run.state.update(edit)
    with pytest.raises(error, match=words):
        run.steps(1)
    assert torch.equal(run.params[0], at)
    run.state.clear()
    run.state.update(before)
    assert run.steps(2).losses[-1] == whole.steps(2).losses[-1]


@pytest.mark.parametrize("options", [{"lr": 1e-3}, WOLFE], ids=["fixed", "wolfe"])
@pytest.mark.parametrize("fails_at", range(1, 7))
def test_a_closure_that_raises(options, fails_at):
    """The parameters stay where the last completed iteration left them, and the run goes on to the same end."""
    run = start(LBFGS, "rosenbrock-10", **options).steps(1)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise KeyError("data")
        return run.closure()

    with pytest.raises(KeyError):
        run.optimizer.step(closure)
    at = rosenbrock(run.params[0].detach()).item()
    assert at <= run.losses[0]
    if options is WOLFE and fails_at > 1:
        assert at in run.losses
    run.steps(15)
    assert run.losses[-1] < at


def test_a_first_search_that_fails_is_made_up_for():
    run, whole = (start(LBFGS, "rosenbrock-10", **WOLFE) for _ in range(2))
    closures = iter([run.closure])
    with pytest.raises(StopIteration):
        run.optimizer.step(lambda: next(closures)())
    assert run.steps(1).losses[1:] == whole.steps(1).losses


def test_no_gradient_and_sparse_gradients():
    dense, idle = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(3))
    other = torch.nn.Parameter(torch.ones(4, 2))
    both = LBFGS([dense, idle], lr=0.1), torch.optim.LBFGS([other], lr=0.1)

    def closure():
        dense.grad = (2 * dense.detach()).to_sparse()
        return (dense.detach() ** 2).sum()

    def closure_dense():
        other.grad = 2 * other.detach()
        return (other.detach() ** 2).sum()

    both[0].step(closure)
    both[1].step(closure_dense)
    torch.testing.assert_close(dense, other)
    assert torch.equal(idle, torch.ones(3))


def test_overlapping_parameters_take_torchs_code():
    base = torch.ones(6)
    optimizer = LBFGS([base[:4], base[2:]], lr=0.1)
    assert not explain(optimizer)[0].native and "share memory" in explain(optimizer)[0].reason
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step(lambda: 1.0)
    assert base[3] < base[0]
    with pytest.raises(RuntimeError, match="recover"):
        LBFGS([base[:4], base[2:]], recover=True).step(lambda: 1.0)


def test_overlapping_views_take_torchs_code():
    base = torch.ones(6)
    for views in ((base, base[::2]), (base.view(2, 3), base.view(2, 3).t())):
        assert "share memory" in explain(LBFGS([*views]))[0].reason


def test_a_parameter_whose_elements_share_memory():
    moved, expanded = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1).expand(3))
    optimizer = LBFGS([moved, expanded], lr=0.1)
    for p in (moved, expanded):
        p.grad = torch.ones(p.shape)
    with pytest.raises(RuntimeError, match="parameter 1 has elements that share memory"):
        optimizer.step(lambda: 1.0)
    assert torch.equal(moved, torch.ones(2)) and not optimizer.state[moved]


@pytest.mark.parametrize("count", [1, 3])
def test_a_gradient_of_another_shape(count):
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(count)]
    optimizer = LBFGS(params, lr=0.1)
    for p in params:
        p.grad = torch.ones(4)
    kept = params[-1].data
    params[-1].data = torch.ones(2)
    params[-1].grad = torch.ones(2)
    params[-1].data = kept
    with pytest.raises(RuntimeError, match=rf"parameter {count - 1} of LBFGS has shape \[4\], its gradient \[2\]"):
        optimizer.step(lambda: 1.0)
    assert all(torch.equal(p, torch.ones(4)) for p in params)


def test_a_closure_that_raises_where_the_slope_is_infinite():
    """The point before is put back as it was, not reached by going back."""
    param = torch.nn.Parameter(torch.tensor([1.0, 0.0, 3.0]))
    optimizer = LBFGS([param], **WOLFE)
    calls = []

    def closure():
        calls.append(None)
        if len(calls) > 1:
            raise ArithmeticError
        optimizer.zero_grad()
        loss = param.abs().sqrt().sum()
        loss.backward()
        param.grad[1] = torch.inf
        return loss

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert torch.equal(param, torch.tensor([1.0, 0.0, 3.0]))


def lent(optimizer):
    return optimizer._workspace.history.vectors


def test_starting_anew_and_failing_keep_no_memory():
    run = start(LBFGS, "rosenbrock-100", history_size=5, max_iter=8, **WOLFE)
    counts = []
    for _ in range(4):
        run.steps(2)
        counts.append(lent(run.optimizer))
        run.optimizer.state.clear()
    assert max(counts) <= min(counts) + 1
    counts = []
    for _ in range(4):
        run.steps(1)
        loss, calls = run.loss, run.calls

        def fails(params, loss=loss, calls=calls):
            if run.calls > calls:
                raise ArithmeticError
            return loss(params)

        run.loss = fails
        with pytest.raises(ArithmeticError):
            run.steps(1)
        run.loss = loss
        counts.append(lent(run.optimizer))
    assert max(counts) <= counts[0] + 1  # what the first of them has made once


def test_returns_the_first_loss_as_it_was_given():
    for value in (torch.tensor([2.0]), torch.tensor(2.0), 2.0, 2):
        for tolerance in (float("inf"), -float("inf")):
            param = torch.nn.Parameter(torch.ones(2))
            param.grad = torch.ones(2)
            found = LBFGS([param], tolerance_grad=tolerance, lr=0.1).step(lambda value=value: value)
            assert found is value


def test_closure_runs_with_gradients_and_hooks_fire():
    run = start(LBFGS, "rosenbrock-10", max_iter=2)
    seen = []
    run.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with torch.no_grad():
        run.optimizer.step(lambda: (seen.append(torch.is_grad_enabled()), run.closure())[1])
    assert seen[0] == "before" and seen[-1] == "after" and all(seen[1:-1])


def test_compiled_step_is_left_to_python():
    run = start(LBFGS, "rosenbrock-10", max_iter=2)
    torch.compile(lambda: run.steps(1), backend="eager")()
    assert run.calls == 2


def test_memory_is_used_again():
    """A full history takes no new memory, and a state_dict that somebody kept is not written to."""
    run = start(LBFGS, "rosenbrock-100", history_size=3, max_iter=4, **WOLFE).steps(3)
    pointers = {row.data_ptr() for row in (*run.state["old_dirs"], *run.state["old_stps"])}
    run.steps(1)
    again = {row.data_ptr() for row in (*run.state["old_dirs"], *run.state["old_stps"])}
    assert len(pointers & again) >= 2
    kept = run.optimizer.state_dict()["state"][0]
    rows = [*kept["old_dirs"], *kept["old_stps"], kept["d"], kept["prev_flat_grad"]]
    copies = [row.clone() for row in rows]
    run.steps(3)
    assert all(torch.equal(a, b) for a, b in zip(rows, copies, strict=True))
