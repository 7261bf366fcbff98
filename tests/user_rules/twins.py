"""Our element-wise rules and those that take norms, written again as a user would write them: the built-in classes are their
oracles."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs import cases

import optim_ext
from optim_ext.math import lerp, maximum, minimum, sign, sqrt, where

rule = optim_ext.rule
FLT_MAX = 3.4028234663852886e38


def with_l2(grad, param, weight_decay):
    return grad + weight_decay * param if weight_decay != 0 else grad


def decayed(param, grad, lr, weight_decay, decoupled):
    """Parameter and gradient after the decay, of either kind."""
    if decoupled:
        param = (1 - lr * weight_decay) * param
    else:
        grad = with_l2(grad, param, weight_decay)
    return param, grad


def mean_square(average, grad, beta):
    return beta * average + (1 - beta) * grad * grad


@rule({"momentum_buffer": 0.0}, backend="interpreted")
def SGD(
    param,
    grad,
    momentum_buffer,
    *,
    step,
    lr=1e-3,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    moves=False,
):
    grad = with_l2(grad, param, weight_decay)
    update = grad
    if moves:
        kept = 0.0 if step == 1 else momentum
        taken = 1.0 if step == 1 else 1 - dampening
        momentum_buffer = kept * momentum_buffer + taken * grad
        update = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    return param - lr * update, momentum_buffer


@rule(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), backend="interpreted")
def Adam(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    *,
    step,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    amsgrad=False,
    decoupled_weight_decay=False,
):
    beta1, beta2 = betas
    param, grad = decayed(param, grad, lr, weight_decay, decoupled_weight_decay)
    exp_avg = lerp(exp_avg, grad, 1 - beta1)
    exp_avg_sq = mean_square(exp_avg_sq, grad, beta2)
    second_moment = exp_avg_sq
    if amsgrad:
        second_moment = max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    denom = sqrt(second_moment) * (1 / sqrt(1 - beta2**step)) + eps
    return param - lr / (1 - beta1**step) * (exp_avg / denom), exp_avg, exp_avg_sq, max_exp_avg_sq


@rule(("square_avg", "grad_avg", "momentum_buffer"), backend="interpreted")
def RMSprop(
    param,
    grad,
    square_avg,
    grad_avg,
    momentum_buffer,
    *,
    lr=1e-2,
    alpha=0.99,
    eps=1e-8,
    weight_decay=0.0,
    momentum=0.0,
    centered=False,
    moves=False,
):
    grad = with_l2(grad, param, weight_decay)
    square_avg = mean_square(square_avg, grad, alpha)
    variance = square_avg
    if centered:
        grad_avg = lerp(grad_avg, grad, 1 - alpha)
        variance = square_avg - minimum(grad_avg * grad_avg, FLT_MAX)
    update = grad / (sqrt(variance) + eps)
    if moves:
        update = momentum_buffer = momentum * momentum_buffer + update
    return param - lr * update, square_avg, grad_avg, momentum_buffer


@rule({"sum": "initial_accumulator_value"}, backend="interpreted")
def Adagrad(
    param, grad, sum, *, step, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10
):
    grad = with_l2(grad, param, weight_decay)
    sum = sum + grad * grad
    return param - lr / (1 + (step - 1) * lr_decay) * (grad / (sqrt(sum) + eps)), sum


@rule(("square_avg", "acc_delta"), backend="interpreted")
def Adadelta(param, grad, square_avg, acc_delta, *, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0):
    grad = with_l2(grad, param, weight_decay)
    square_avg = mean_square(square_avg, grad, rho)
    delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * grad
    acc_delta = mean_square(acc_delta, delta, rho)
    return param - lr * delta, square_avg, acc_delta


@rule(("exp_avg", "exp_inf"), backend="interpreted")
def Adamax(param, grad, exp_avg, exp_inf, *, step, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    grad = with_l2(grad, param, weight_decay)
    exp_avg = lerp(exp_avg, grad, 1 - betas[0])
    exp_inf = maximum(betas[1] * exp_inf, abs(grad) + eps)
    return param - lr / (1 - betas[0] ** step) * (exp_avg / exp_inf), exp_avg, exp_inf


@rule(("exp_avg", "exp_avg_sq"), scalars={"mu_product": 1.0}, backend="interpreted")
def NAdam(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    mu_product,
    *,
    step,
    lr=2e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    momentum_decay=4e-3,
    decoupled_weight_decay=False,
):
    beta1, beta2 = betas
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    before, mu_product = mu_product, mu  # rounded to the precision in which the product is kept
    mu_product = before * mu_product
    param, grad = decayed(param, grad, lr, weight_decay, decoupled_weight_decay)
    exp_avg = lerp(exp_avg, grad, 1 - beta1)
    exp_avg_sq = mean_square(exp_avg_sq, grad, beta2)
    denom = sqrt(exp_avg_sq) / sqrt(1 - beta2**step) + eps
    from_grad = lr * (1 - mu) / (1 - mu_product) * (grad / denom)
    from_momentum = lr * mu_next / (1 - mu_product * mu_next) * (exp_avg / denom)
    return param - from_grad - from_momentum, exp_avg, exp_avg_sq, mu_product


@rule(("exp_avg", "exp_avg_sq"), backend="interpreted")
def RAdam(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    *,
    step,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decoupled_weight_decay=False,
):
    beta1, beta2 = betas
    beta2_power = beta2**step
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2_power / (1 - beta2_power)
    rectified = rho > 5
    rectification = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) if rectified else 0.0
    rate = lr / (1 - beta1**step) * (sqrt(1 - beta2_power) * rectification if rectified else 1.0)
    param, grad = decayed(param, grad, lr, weight_decay, decoupled_weight_decay)
    exp_avg = lerp(exp_avg, grad, 1 - beta1)
    exp_avg_sq = mean_square(exp_avg_sq, grad, beta2)
    denom = sqrt(exp_avg_sq) + eps if rectified else 1.0
    return param - rate * (exp_avg / denom), exp_avg, exp_avg_sq


@rule({"prev": 0.0, "step_size": "lr"}, backend="interpreted")
def Rprop(param, grad, prev, step_size, *, lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50.0)):
    agreement = grad * prev
    factor = where(agreement > 0, etas[1], where(agreement < 0, etas[0], 1.0))
    grown = step_size * factor
    step_size = where(grown < step_sizes[0], step_sizes[0], grown)
    step_size = where(step_size > step_sizes[1], step_sizes[1], step_size)
    prev = where(agreement < 0, 0.0, grad)
    return param - sign(prev) * step_size, prev, step_size


@rule({"ax": 0.0}, scalars={"eta": "lr", "mu": 1.0}, check={"alpha": None}, backend="interpreted")
def ASGD(param, grad, ax, eta, mu, *, step, lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0):
    grad = with_l2(grad, param, weight_decay)
    param = (1 - lambd * eta) * param - eta * grad
    ax = ax + (param - ax) * mu if mu != 1 else param
    eta = lr / (1 + lambd * lr * step) ** alpha
    mu = 1 / max(step - t0, 1.0)
    return param, ax, eta, mu


@rule("exp_avg", backend="interpreted")
def Lion(param, grad, exp_avg, *, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    update = sign(betas[0] * exp_avg + (1 - betas[0]) * grad)
    exp_avg = betas[1] * exp_avg + (1 - betas[1]) * grad
    return (1 - lr * weight_decay) * param - lr * update, exp_avg


def example(name):
    """A rule of examples/rules, interpreted."""
    path = Path(__file__).parents[2] / "examples/rules" / f"{name.lower()}.py"
    spec = importlib.util.spec_from_file_location(f"twin_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    definition = getattr(module, name)._definition
    return rule(definition.states, check=definition.options.check, backend="interpreted")(definition.function)


LAMB, LARS = example("LAMB"), example("LARS")


@dataclass(frozen=True)
class Twin:
    """A class and what its options are called that the built-in one tells from numbers."""

    made: type[optim_ext.Optimizer]
    adapted: Callable[[dict[str, Any]], dict[str, Any]] = lambda options: {}


TWINS = {
    "SGD": Twin(SGD, lambda o: {"moves": o.get("momentum", 0) != 0}),
    "Adam": Twin(Adam),
    "AdamW": Twin(Adam, lambda o: {"decoupled_weight_decay": True, "weight_decay": o.get("weight_decay", 1e-2)}),
    "RMSprop": Twin(RMSprop, lambda o: {"moves": o.get("momentum", 0) > 0}),
    "Adagrad": Twin(Adagrad),
    "Adadelta": Twin(Adadelta),
    "Adamax": Twin(Adamax),
    "NAdam": Twin(NAdam),
    "RAdam": Twin(RAdam),
    "Rprop": Twin(Rprop),
    "ASGD": Twin(ASGD),
    "Lion": Twin(Lion),
    "LAMB": Twin(LAMB),
    "LARS": Twin(LARS),
}


def accepts(made, options):
    return set(options) <= set(made.__signature__.parameters)


# The option sets of specs.py that a twin has all options of.
TWIN_CASES = [case for case in cases() if case.spec.name in TWINS and accepts(TWINS[case.spec.name].made, case.options)]
