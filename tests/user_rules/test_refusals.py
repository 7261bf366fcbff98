"""What cannot be a rule is refused where it is written: with its line, its column and what to write instead."""

import math
import re
import traceback

import numpy
import pytest
import torch

import optim_ext
from optim_ext import RuleError
from optim_ext.math import exp, lerp, maximum, norm, rms, sqrt, where

TENSOR = torch.ones(3)
LIST = [1.0, 2.0]


def by_itself(x):
    return by_itself(x)


def length(x):
    return norm(x) * 2


NAMES = {
    "torch": torch,
    "math": math,
    "numpy": numpy,
    "sqrt": sqrt,
    "where": where,
    "lerp": lerp,
    "exp": exp,
    "maximum": maximum,
    "norm": norm,
    "rms": rms,
    "length": length,
    "TENSOR": TENSOR,
    "LIST": LIST,
    "by_itself": by_itself,
}

# The body of a rule with an option lr, a state m and a truth value on; what the caret points at; words of the message.
BODIES = [
    ("for i in range(3): m = m + grad", "for i", "loops are not possible in a rule, which describes one element"),
    ("while lr > 0: m = m + grad", "while lr", "loops are not possible"),
    ("x = [g for g in (1, 2)]", "[g for", "loops are not possible"),
    ("if grad > 0: m = grad", "grad > 0", r"differs from element to element; use where\(condition, a, b\)"),
    ("m = grad if grad > 0 else m", "grad > 0", r"use where\(condition, a, b\)"),
    ("if grad: m = grad", "grad:", "a number that differs from element to element, no condition; compare it"),
    ("m = where(m, grad, m)", "m, grad", "no condition; compare it"),
    (
        "m = grad / grad.norm()",
        "grad.norm()",
        r"\.norm\(\) is not an operation on one element; possible are abs, clamp, .* and of whole tensors norm and rms of "
        "optim_ext.math",
    ),
    ("m = grad.item()", "grad.item()", r"\.item\(\) is not an operation on one element"),
    ("m = torch.mean(grad)", "torch.mean(grad)", "torch.mean is not an operation on one element; possible are"),
    ("m = torch.norm(grad)", "torch.norm(grad)", "torch.norm is not an operation on one element"),
    ("m = numpy.sqrt(grad)", "numpy.sqrt(grad)", "numpy.sqrt is not an operation on one element"),
    ("m = print(grad)", "print(grad)", "print is not an operation on one element"),
    ("m.mul_(lr)", "m.mul_(lr)", r"\.mul_\(\) works in place, which is not possible in a rule; write x = "),
    ("m = m.add_(grad)", "m.add_(grad)", r"\.add_\(\) works in place"),
    ("sqrt(grad)", "sqrt(grad)", "has no effect; write x = "),
    ("m + grad", "m + grad", "has no effect"),
    ("m = grad[0]", "grad[0]", "indexing is not possible: a rule sees one element, and only tuples have entries"),
    ("m[0] = grad", "m[0]", r"indexing is not possible: a rule sees one element; use where"),
    ("m.x = grad", "m.x", "only names can be assigned to"),
    ("m = betas[2] * grad", "betas[2]", "there is no entry 2 of 2"),
    ("m = betas[step] * grad", "betas[step]", "by a constant whole number only"),
    ("m = betas * grad", "betas * grad", "is a tuple, where one value is needed"),
    ("a, b, c = betas", "a, b, c", r"2 value\(s\) for 3 names"),
    ("a, b = lr", "a, b", r"one value\(s\) for 2 names"),
    ("m = where(0 < grad < 1, grad, m)", "0 < grad < 1", r"compare two values at a time: \(a < b\) & \(b < c\)"),
    ("m = where(grad > 0 and m > 0, grad, m)", "grad > 0 and", "`and` and `or` of what differs .*; use & and |"),
    ("m = where(not grad > 0, grad, m)", "not grad > 0", "`not` of what differs from element to element; use ~"),
    ("m = where(grad & m, grad, m)", "grad & m", "& and | are for conditions"),
    ("m = ~grad", "~grad", "~ is for conditions"),
    ("if lr > 1:\n        x = grad\n    m = x", "x", "x is assigned in one branch only"),
    ("if lr > 1:\n        return param, m", "return param, m", "a return within an if on a number"),
    ("m = unknown * grad", "unknown", "name 'unknown' is not defined"),
    ("m = math.unknown * grad", "math.unknown", "math.unknown is not defined"),
    ("m = unknown(grad)", "unknown", "name 'unknown' is not defined"),
    ("m = TENSOR * grad", "TENSOR", "TENSOR is a tensor; only numbers, and tuples of numbers, come from outside"),
    ("m = LIST * grad", "LIST", "LIST is list; only numbers"),
    ("m = torch.clamp(grad, min=0.0)", "torch.clamp(grad, min=0.0)", "arguments by keyword are not possible in a rule"),
    ("m = torch.clamp(*grad)", "torch.clamp(*grad)", "arguments cannot be unpacked"),
    ("m = sqrt(grad, m)", "sqrt(grad, m)", "sqrt takes 1 values here, 2 given"),
    ("m = math.sqrt(grad)", "math.sqrt(grad)", "math.sqrt takes numbers only, .* use optim_ext.math.sqrt"),
    ("m = min(grad, m)", "min(grad, m)", "min takes numbers only, .* use minimum"),
    ("m = torch.sqrt(lr) * grad", "torch.sqrt(lr)", "torch.sqrt takes tensors, .* use optim_ext.math.sqrt"),
    ("m = torch.maximum(grad, lr)", "torch.maximum(grad, lr)", "takes tensors, .* use optim_ext.math.maximum"),
    ("m = torch.where(grad > 0, 1.0, 0.5)", "torch.where(grad", "torch's default dtype; use optim_ext.math.where"),
    ("m = by_itself(grad)", "by_itself(x)", "calls itself"),
    ("m = norm(lr) * grad", "lr", "norm is of what differs from element to element, and this is a number"),
    ("m = rms(norm(grad)) * grad", "norm(grad)", "rms is of what differs from element to element"),
    ("m = norm(grad > 0) * grad", "grad > 0", "arithmetic with a truth value"),
    ("m = norm(grad, m) * grad", "norm(grad, m)", "norm takes 1 values here, 2 given"),
    ("m = norm(grad, dim=0) * grad", "norm(grad, dim=0)", "arguments by keyword are not possible in a rule"),
    (
        "m = grad / rms(grad); m = m / norm(m)",
        "norm(m)",
        "norm of what depends on another norm; all norms of a rule are taken in one sweep, before anything is changed",
    ),
    ("m = rms(where(norm(grad) > 1, grad, m)) * m", "rms(where", "rms of what depends on another norm"),
    (
        "m = norm(grad) * norm(m) * norm(param) * m",
        "norm(param)",
        r"one number of a parameter too many: kernels take 2, and there are norm\(grad\), norm\(m\)",
    ),
    ("m = norm(grad) * rms(grad) * rms(m) * m", "rms(m)", r"too many: .*there are norm\(grad\), rms\(grad\)"),
    (
        "m = math.sqrt(norm(m)) * m",
        "math.sqrt(norm",
        "takes numbers only, .* tensors to Python; use optim_ext.math.sqrt",
    ),
    ("m = max(norm(m), 1.0) * m", "max(norm", "max takes numbers only, and norms are tensors to Python; use maximum"),
    ("m = float(norm(m)) * m", "float(norm", "float takes numbers only, .*; use it as it is"),
    ("m = torch.sqrt(norm(m)) * m", "torch.sqrt(norm", "torch.sqrt takes tensors, .* use optim_ext.math.sqrt"),
    ("if norm(m) > grad: m = grad", "norm(m) > grad", r"use where\(condition, a, b\)"),
    ("m = grad ** m", "grad ** m", "an exponent that differs from element to element"),
    ("m = grad ** 1.5", "grad ** 1.5", "a constant exponent: 0.5, or a whole number from 1 to 8"),
    ("m = grad ** 9", "grad ** 9", "a whole number from 1 to 8"),
    ("m = grad // 2", "grad // 2", "the operator of 'grad // 2' is not possible"),
    ("m = grad % 2", "grad % 2", "is not possible in a rule"),
    ("m = (grad > 0) * grad", "grad > 0", r"arithmetic with a truth value; use where\(condition, 1.0, 0.0\)"),
    ("m = on * grad", "on * grad", "arithmetic with a truth value"),
    ("m = 'x' * grad", "'x'", "arithmetic with 'x'"),
    ("m = where(grad > 0, on, m)", "where(grad", "only numbers can be chosen between"),
    ("m = grad.shape", "grad.shape", r"\.shape is not possible: a rule sees the value of one element, not a tensor"),
    ("m = grad < on", "on", "only numbers are compared"),
    ("m = 1 / 0 * grad", "1 / 0", "division by zero"),
    ("m = lambda x: x", "lambda x", "a lambda is not possible in a rule"),
    ("def f(x): return x", "def f", "a function within the function is not possible"),
    ("import math", "import math", "an import is not possible"),
    ("assert lr > 0", "assert lr", "assert is not possible"),
    ("global x", "global x", "global is not possible"),
    ("m = f'{lr}'", "f'", "a formatted string is not possible"),
    ("return param", "param", r"returns 1 value\(s\), expected 2: \(param, m\)"),
    ("return param, grad > 0", "param, grad", "the new m is no number"),
    ("return", "return", "returns nothing"),
    ("return param, m\n    m = grad", "m = grad", "follows a return"),
]


def refusal(code, **arguments):
    names = dict(NAMES)
    exec(code, names)
    function = next(value for key, value in names.items() if key == "f")
    with pytest.raises(RuleError) as caught:
        optim_ext.rule(arguments.pop("state", "m"), source=code, **arguments)(function)
    return caught.value


@pytest.mark.parametrize(("body", "caret", "words"), BODIES, ids=[body.partition("\n")[0] for body, _, _ in BODIES])
def test_a_body_is_refused_with_its_line(body, caret, words):
    end = "" if body.startswith("return") else "    return param, m\n"
    code = f"def f(param, grad, m, *, step, lr=0.1, betas=(0.9, 0.99), on=False):\n    {body}\n{end}"
    error = refusal(code)
    assert isinstance(error, SyntaxError)
    assert re.search(words, error.msg), error.msg
    if "by_itself" in body:
        return  # which is refused where it calls itself
    line = code.splitlines()[error.lineno - 1]
    assert error.text.rstrip("\n") == line
    assert line[error.offset - 1 :].startswith(caret), (line, error.offset)


HEADS = [
    ("def f(param, grad, *, lr=0.1): return param", "takes (param, grad), expected (param, grad, m)"),
    ("def f(param, grad, n, *, lr=0.1): return param, n", "takes (param, grad, n), expected (param, grad, m)"),
    ("def f(param, grad, m, *args): return param, m", "*args and **kwargs are not possible"),
    ("def f(param, grad, m, **kwargs): return param, m", "*args and **kwargs are not possible"),
    ("def f(param, grad, m=0): return param, m", "options follow a `*`"),
    ("def f(param, grad, m, *, lr): return param, m", "the option lr has no default"),
    ("def f(param, grad, m, *, lr=[1.0]): return param, m", "possible are numbers, tuples of numbers, truth values"),
    ("def f(param, grad, m, *, lr=()): return param, m", "possible are numbers"),
    ("def f(param, grad, m, *, step=1): return param, m", "step is the count of steps and has no default"),
    ("def f(param, grad, m, *, maximize=False): return param, m", "every rule has maximize already"),
    ("def f(param, grad, m, *, params=1.0): return param, m", "every rule has params already"),
    ("def f(param, grad, m, *, m_=1.0, alpha=5.0): return param, m", "Invalid alpha value: 5.0 is its own default"),
    ("def f(param, grad, m, *, lr=-1.0): return param, m", "check={'lr': lambda x: ...}"),
    ("def f(param, grad, m): pass", "returns nothing"),
]


@pytest.mark.parametrize(("code", "words"), HEADS, ids=[code for code, _ in HEADS])
def test_a_signature_is_refused_with_its_line(code, words):
    error = refusal(code + "\n")
    assert words in error.msg and error.lineno == 1 and error.text == code + "\n"


def test_too_many_states_are_named_by_the_decorator():
    names = [f"s{k}" for k in range(9)]
    error = refusal(f"def f(param, grad, {', '.join(names)}): return param, {', '.join(names)}\n", state=names)
    assert "has 9 states (s0, s1, s2, s3, s4, s5, s6, s7, s8), and kernels take at most 8" in error.msg


def test_too_many_scalars_are_named_by_the_decorator():
    error = refusal(
        "def f(param, grad, a, b, c): return param, a, b, c\n", state=(), scalars={"a": 0.0, "b": 0.0, "c": 0.0}
    )
    assert "has 3 scalars (a, b, c), and kernels take at most 2" in error.msg


def test_a_norm_too_many_beside_scalars_is_refused_with_its_line():
    error = refusal(
        "def f(param, grad, a):\n    return param * norm(grad) * norm(param), a\n", state=(), scalars={"a": 0.0}
    )
    assert "kernels take 2, and there are a, norm(grad)" in error.msg
    assert (error.lineno, error.text[error.offset - 1 :]) == (2, "norm(param), a\n")


def test_a_norm_of_a_computed_value_needs_room_beside_the_states():
    names = [f"s{k}" for k in range(8)]
    head = f"def f(param, grad, {', '.join(names)}):\n"
    error = refusal(f"{head}    return param * norm(2 * grad), {', '.join(names)}\n", state=names)
    assert "is of a computed value, for which kernels have no room beside 8 states; they take 7 then" in error.msg
    assert (error.lineno, error.text[error.offset - 1 :].partition(",")[0]) == (2, "norm(2 * grad)")


def test_a_scalar_is_one_number():
    error = refusal("def f(param, grad, a): return param, grad\n", state=(), scalars={"a": 0.0})
    assert "the new a differs from element to element, but it is one number" in error.msg


def test_a_state_starts_as_something_known():
    error = refusal("def f(param, grad, m): return param, m\n", state={"m": "rate"})
    assert "the state 'm' starts as 'rate', which is no option, and not 'param'" in error.msg


def test_a_check_is_of_an_option():
    error = refusal("def f(param, grad, m): return param, m\n", check={"rate": None})
    assert "check= names 'rate', which is no option" in error.msg


def test_source_that_is_not_at_hand_is_asked_for():
    names = {}
    exec("def f(param, grad, *, lr=0.1):\n    return param - lr * grad\n", names)
    with pytest.raises(
        RuleError, match="its source is not at hand; define it in a file or a notebook cell, or pass source="
    ):
        optim_ext.rule(names["f"])


def test_python_prints_the_line_and_the_caret():
    def f(param, grad, *, lr=0.1):
        return param - lr * grad.norm()

    with pytest.raises(RuleError) as caught:
        optim_ext.rule(f)
    shown = "".join(traceback.format_exception_only(caught.value))
    assert f'File "{__file__}", line {f.__code__.co_firstlineno + 1}' in shown
    assert "return param - lr * grad.norm()\n" in shown and " ^^^^^^^^^^^" in shown


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"rule\(\) decorates a function, found 3"):
        optim_ext.rule("m")(3)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'gpu', expected one of auto, compiled, interpreted, torch"):
        optim_ext.rule("m", backend="gpu")


def test_a_backend_of_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_RULES", "gpu")

    def f(param, grad, *, lr=0.1):
        return param - lr * grad

    with pytest.raises(ValueError, match="OPTIM_EXT_RULES is 'gpu'"):
        optim_ext.rule(f)
