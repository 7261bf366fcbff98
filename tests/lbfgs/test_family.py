"""LBFGS as one of this package's optimizers: the same controls, texts and refusals, and what is there for any optimizer."""

import copy
import gc
import math
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from problems import start

import optim_ext
from optim_ext import LBFGS, utils

WOLFE = {"line_search_fn": "strong_wolfe"}


class Plain(optim_ext.Optimizer):
    """A rule of a user's own, in Python."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


def wrapped(params):
    class Wrapper:  # as schedulefree's, which is no Optimizer
        def __init__(self, inner):
            self.inner, self.param_groups = inner, inner.param_groups

        def step(self):
            self.inner.step()

    return Wrapper(Plain(params))


ANY = {
    "ours": lambda params: optim_ext.SGD(params, lr=0.1),
    "torch's": lambda params: torch.optim.SGD(params, lr=0.1),
    "plain": Plain,
    "wrapper": wrapped,
}


class Calls:
    """A history that notes which of its methods are called."""

    def __init__(self, history):
        self.history, self.names = history, []

    def __getattr__(self, name):
        found = getattr(self.history, name)
        if not callable(found):
            return found

        def call(*args, **kwargs):
            self.names.append(name)
            return found(*args, **kwargs)

        return call


@pytest.mark.parametrize(
    "options", [{"lr": 1e-3}, WOLFE, {"lr": 1e-3, "damping": 0.2}], ids=["fixed", "wolfe", "damped"]
)
def test_an_iteration_calls_the_history_three_times(options):
    """A search calls it twice more for every further point, and a step twice besides: to take the state up and to save."""
    run = start(
        LBFGS, "rosenbrock-10", max_iter=5, max_eval=100, tolerance_change=0, tolerance_grad=0, **options
    ).steps(3)
    calls = run.optimizer._workspace.history = Calls(run.optimizer._workspace.history)
    evaluations = run.calls
    run.steps(1)
    evaluations = run.calls - evaluations
    assert calls.names[:2] == ["evaluate", "load"] and calls.names[-1] == "save"
    in_iterations = calls.names[2:-1]
    assert in_iterations.count("depart") == 5
    if "line_search_fn" in options:
        further = evaluations - 1 - 5
        assert len(in_iterations) == 3 * 5 + 2 * further
    else:
        assert len(in_iterations) == 2 * 5 - 1  # the last move is not evaluated


@pytest.mark.parametrize("options", [{}, WOLFE, {"bounds": (-1.0, 1.0)}], ids=["fixed", "wolfe", "bounded"])
def test_a_hook_that_has_the_optimizer_keeps_nothing_alive(options):
    """A cycle of references through the optimizer is for Python's garbage collector to find."""
    run = start(LBFGS, "rosenbrock-10", max_iter=3, **options).steps(2)
    run.params[0].register_hook(lambda grad, optimizer=run.optimizer: grad)
    kept = [weakref.ref(of) for of in (run.params[0], run.optimizer, run.state["d"])]
    del run
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_help_and_repr_tell_what_is_added():
    for cls in (LBFGS, optim_ext.AdamW):
        assert "average_into(averaged)" in cls.__doc__ and cls.__doc__.count("What optim_ext adds") == 1
    assert "clip_grad_norm" not in LBFGS.__doc__.split("What optim_ext adds")[1]

    class Own(LBFGS):
        """Mine."""

    assert Own.__doc__ == "Mine."
    optimizer = LBFGS([torch.zeros(2, requires_grad=True)])
    assert "grad_policy" not in repr(optimizer)
    optimizer.set_grad_policy(skip_above=3.0)
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert "grad_policy: GradPolicy(" in repr(one) and "skip_above=3.0" in repr(one)


def test_controls_are_there_from_the_constructor_on():
    """Frameworks share an optimizer's attributes with a wrapper before anybody asks for one."""
    for cls in (LBFGS, optim_ext.AdamW):
        optimizer = cls([torch.zeros(2, requires_grad=True)])
        for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert one.__dict__["_controls"].groups == 1
        optimizer.add_param_group({"params": [torch.zeros(1)]})
        assert optimizer._asked().groups == 2


@pytest.mark.parametrize(
    "ask", [lambda o: utils.clip_optimizers(o, 1.0), lambda o: utils.share_grad_policy(o, skip_nonfinite=True)]
)
def test_a_norm_with_other_optimizers_is_refused_in_one_sentence(ask):
    params = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    first = optim_ext.SGD(params[:1])
    with pytest.raises(
        TypeError, match="optimizer 1 is LBFGS, .* evaluates gradients within its step and does not clip"
    ):
        ask([first, LBFGS(params[1:])])
    assert first.grad_policy is None
    with pytest.raises(TypeError, match="optimizer 1 is Plain, expected one of optim_ext's with native steps"):
        ask([first, Plain(params[1:])])


@pytest.mark.parametrize("make", ANY.values(), ids=ANY.keys())
def test_any_optimizer_is_looked_at(make):
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.full((2, 2), 2.0))]
    optimizer = make([{"params": params[:1]}, {"params": params[1:]}])
    for p in params:
        p.grad = torch.ones_like(p)
    with utils.measure_step(optimizer) as norms:
        optimizer.step()
    assert [each.update.item() for each in norms] == pytest.approx([0.1 * math.sqrt(3), 0.2])
    assert [each.grad.item() for each in norms] == pytest.approx([math.sqrt(3), 2.0])
    assert utils.find_nonfinite(optimizer) == []
    params[1].grad[0, 1] = math.inf
    assert utils.find_nonfinite(optimizer) == [("parameter 0 of group 1", 1, 0)]


def test_parameters_are_looked_at():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    assert utils.find_nonfinite(model.parameters()) == []
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    model[0].bias.grad = torch.full((2,), -math.inf)
    assert utils.find_nonfinite(model.parameters()) == [("parameter 1", 2, 0), ("parameter 2", 0, 1)]
    assert utils.find_nonfinite(model.named_parameters()) == [("0.bias", 2, 0), ("1.weight", 0, 1)]
    assert utils.find_nonfinite(model[1].weight) == [("parameter 0", 0, 1)]
    assert utils.find_nonfinite([]) == []


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: utils.find_nonfinite(3), "an optimizer or parameters, found int"),
        (lambda: utils.find_nonfinite([torch.zeros(1), "weight"]), "parameter 1 is str, expected a tensor"),
        (lambda: utils.measure_step(torch.zeros(1)), "takes an optimizer, found Tensor"),
    ],
)
def test_what_cannot_be_looked_at(ask, words):
    with pytest.raises(TypeError, match=words):
        ask()
