"""examples/rules: each against its paper's formula, written in another way, in float64."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from lockstep import native_ops

import optim_ext

FOLDER = Path(__file__).parents[2] / "examples/rules"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_rules_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, optim_ext.Optimizer)]
    (only,) = made
    return only


def moments(s, g, *betas):
    """Adam's: averages of the gradient and of its square, corrected for their start at zero."""
    s.m, s.v = betas[0] * s.m + (1 - betas[0]) * g, betas[1] * s.v + (1 - betas[1]) * g**2
    return s.m / (1 - betas[0] ** s.t), s.v / (1 - betas[1] ** s.t)


def adabelief(p, g, s):
    s.m = 0.9 * s.m + 0.1 * g
    s.v = 0.999 * s.v + (1 - 0.999) * (g - s.m) ** 2 + 1e-16
    m, v = s.m / (1 - 0.9**s.t), s.v / (1 - 0.999**s.t)
    return p - s.lr * (m / (v.sqrt() + 1e-16) + s.decay * p)


def adan(p, g, s):
    d = g - s.last if s.t > 1 else 0 * g
    s.m = 0.98 * s.m + 0.02 * g
    s.d = 0.92 * s.d + 0.08 * d
    s.v = 0.99 * s.v + 0.01 * (g + 0.92 * d) ** 2
    s.last = g
    m, d, v = s.m / (1 - 0.98**s.t), s.d / (1 - 0.92**s.t), s.v / (1 - 0.99**s.t)
    return (p - s.lr / (v.sqrt() + 1e-8) * (m + 0.92 * d)) / (1 + s.lr * s.decay)


def sophia_g(p, g, s):
    s.m = 0.965 * s.m + 0.035 * g
    clipped = (s.m / (0.04 * s.hessian + 1e-15)).clamp(-1, 1)
    return p - s.lr * s.decay * p - s.lr * clipped


def qhadam(p, g, s):
    m, v = moments(s, g, 0.995, 0.999)
    return p - s.lr * (0.3 * g + 0.7 * m) / (v.sqrt() + 1e-8)


def tiger(p, g, s):
    s.m = 0.965 * s.m + 0.035 * g
    return p - s.lr * (s.m.sign() + s.decay * p)


def signum(p, g, s):
    s.m = 0.9 * s.m + 0.1 * g
    return p - s.lr * (s.m.sign() + s.decay * p)


def schedule_free_sgd(p, g, s):
    """In x, y and z, as the paper has it: p is y."""
    if s.t == 1:
        s.x, s.z, s.sum = p.clone(), p.clone(), 0.0
    rate = s.lr * min(s.t / 10, 1.0)
    s.z = s.z - rate * (g + s.decay * p)
    s.sum = torch.tensor(s.sum + rate**2, dtype=torch.float32).item()  # as it is kept
    c = rate**2 / s.sum
    s.x = (1 - c) * s.x + c * s.z
    return 0.1 * s.z + 0.9 * s.x


def cautious_adamw(p, g, s):
    m, v = moments(s, g, 0.9, 0.999)
    update = m / (v.sqrt() + 1e-8)
    return p - s.lr * s.decay * p - s.lr * update * (s.m * g > 0)


def adopt(p, g, s):
    if s.t == 1:
        s.v = g**2
        return p
    limit = (s.t - 1) ** 0.25
    s.m = 0.9 * s.m + 0.1 * (g / s.v.sqrt().clamp(min=1e-6)).clamp(-limit, limit)
    s.v = 0.9999 * s.v + (1 - 0.9999) * g**2
    return p - s.lr * (s.m + s.decay * p)


def mars(p, g, s):
    c = g + 0.025 * 0.95 / 0.05 * (g - s.last if s.t > 1 else 0 * g)
    s.last = g
    m, v = moments(s, c, 0.95, 0.99)
    return p - s.lr * (m / (v.sqrt() + 1e-8) + s.decay * p)


def ademamix(p, g, s):
    b1, b3 = 0.9, 0.9999
    alpha = min(s.t * 5.0 / 4, 5.0)
    share = s.t / 4
    if share < 1:
        b3 = min(b3, math.exp(math.log(b1) * math.log(b3) / ((1 - share) * math.log(b3) + share * math.log(b1))))
    s.slow = b3 * s.slow + (1 - b3) * g
    m, v = moments(s, g, 0.9, 0.999)
    return p - s.lr * ((m + alpha * s.slow) / (v.sqrt() + 1e-8) + s.decay * p)


def grams(p, g, s):
    m, v = moments(s, g, 0.9, 0.999)
    return p - s.lr * (g.sign() * (m / (v.sqrt() + 1e-6)).abs() + s.decay * p)


def stable_adamw(p, g, s):
    b1, b2 = (b * (1 - b ** (s.t - 1)) / (1 - b**s.t) for b in (0.9, 0.99))
    s.m, s.v = b1 * s.m + (1 - b1) * g, b2 * s.v + (1 - b2) * g**2
    rms = (g**2 / s.v.clamp(min=1e-12)).mean().sqrt().item()
    rate = s.lr / max(1.0, rms)
    return p - rate * s.decay * p - rate * s.m / (s.v.sqrt() + 1e-6)


def lamb(p, g, s):
    m, v = moments(s, g, 0.9, 0.999)
    r = m / (v.sqrt() + 1e-6) + s.decay * p
    return p - s.lr * p.norm() / r.norm() * r


def lars(p, g, s):
    rate = 1e-3 * p.norm() / (g.norm() + s.decay * p.norm() + 1e-8)
    s.m = 0.9 * s.m + rate * (g + s.decay * p)
    return p - s.lr * s.m


FORMULAS = {
    formula.__name__: formula
    for formula in (
        adabelief, adan, sophia_g, qhadam, tiger, signum, schedule_free_sgd, cautious_adamw, adopt, mars, ademamix, grams,
        stable_adamw, lamb, lars,
    )
}  # fmt: skip
OPTIONS = {"ademamix": {"warmup": 4}}
NO_DECAY = {"qhadam"}


class State:
    """What a formula remembers of a parameter."""

    def __init__(self, p, lr, decay):
        self.lr, self.decay, self.t = lr, decay, 0
        self.m = self.v = self.d = self.slow = torch.zeros_like(p)
        self.hessian = torch.rand(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(9))


def test_every_example_has_a_formula():
    assert {path.stem for path in FOLDER.glob("*.py")} == FORMULAS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_an_example_is_its_papers_formula(name):
    made, generator = load(name), torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(40, dtype=torch.float64, generator=generator))
    lr = 0.01
    decay = {} if name in NO_DECAY else {"weight_decay": 0.1}
    optimizer = made([param], lr=lr, **decay, **OPTIONS.get(name, {}))
    state, expected = State(param, lr, decay.get("weight_decay", 0.0)), param.detach().clone()
    for t in range(1, 8):
        grad = torch.randn(40, dtype=torch.float64, generator=generator)
        state.t, param.grad = t, grad
        if name == "sophia_g" and t == 1:
            optimizer.state[param].update(exp_avg=torch.zeros_like(param), hessian=state.hessian.clone())
        ran = native_ops(optimizer.step)
        assert ran == ["optim_ext::rule_"]
        expected = FORMULAS[name](expected, grad, state)
        torch.testing.assert_close(param.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_example_takes_ten_lines_or_fewer(name):
    made = load(name)
    source = made._definition.source
    body = source.definition.body
    assert body[-1].end_lineno - body[0].lineno + 1 <= 10
