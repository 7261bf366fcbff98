"""Rules compiled by the compiler at hand: the same bits, at once or in the background, ahead, or not at all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lockstep import bits, give_grads, make_params
from user_rules.test_twins import TYPICAL, assert_same_bits, pair

import optim_ext
from optim_ext._rules import compiler
from optim_ext.math import sign

ROOT = Path(optim_ext.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_cache_of_rules")


def tiger(**more):
    @optim_ext.rule("exp_avg", **more)
    def Tiger(param, grad, exp_avg, *, lr=1e-3, beta=0.965, weight_decay=0.01):
        exp_avg = beta * exp_avg + (1 - beta) * grad
        return param * (1 - lr * weight_decay) - lr * sign(exp_avg), exp_avg

    return Tiger


def stepped(made, steps=3, before_step=lambda step: None):
    params = make_params()
    optimizer = made(params)
    for step in range(steps):
        give_grads(params, step)
        before_step(step)
        optimizer.step()
    return [bits(p) for p in params], optimizer


COMPILED = [case for case in TYPICAL if case.spec.name in ("Adam", "NAdam", "RMSprop", "Rprop", "LAMB", "LARS")]


@pytest.mark.parametrize("twin_case", COMPILED, ids=[case.spec.name for case in COMPILED])
def test_a_compiled_rule_has_the_bits_of_the_built_in_one(twin_case):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
        ours, written = pair(twin_case, dtype)
        variant = written[0]._variant(written[0].param_groups[0])
        compiler.compile_now(variant)
        for step in range(4):
            for optimizer, params in (ours, written):
                give_grads(params, step)
                optimizer.step()
        assert variant.compiled
        assert_same_bits(ours, written)


def test_a_switch_in_mid_run_is_invisible():
    made, other = tiger(backend="interpreted"), tiger(backend="interpreted")
    before, _ = stepped(made, 6)

    def switch(step):
        if step == 3:
            compiler.compile_now(other._variant_with({}))

    assert stepped(other, 6, switch)[0] == before


def test_the_background_compiles_while_steps_are_taken(monkeypatch):
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")
    made = tiger()
    before, optimizer = stepped(tiger(backend="interpreted"))
    found, optimizer = stepped(made)
    assert found == before
    end = time.monotonic() + 120
    while "compiled" not in str(optim_ext.explain(optimizer)[0]) and time.monotonic() < end:
        time.sleep(0.05)
    assert str(optim_ext.explain(optimizer)[0]) == "group 0: native (one call of optim_ext::rule_ per device, compiled)"
    assert stepped(made)[0] == before


def test_without_a_compiler_a_rule_is_interpreted_and_explain_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("OPTIM_EXT_RULES", "auto")
    monkeypatch.delenv("CXX", raising=False)

    @optim_ext.rule
    def Plain(param, grad, *, lr=0.25):
        return param - lr * grad

    _, optimizer = stepped(Plain)
    end = time.monotonic() + 30
    while "no C++ compiler" not in str(optim_ext.explain(optimizer)[0]) and time.monotonic() < end:
        time.sleep(0.02)
    assert "interpreted (there is no C++ compiler (c++, g++, clang++))" in str(optim_ext.explain(optimizer)[0])


def test_a_backend_that_has_to_compile_raises_where_it_cannot(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++ -x")
    made = tiger(backend="compiled")
    with pytest.raises(RuntimeError, match="the C\\+\\+ compiler /nowhere/g\\+\\+ -x is missing"):
        made(make_params())
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="the C\\+\\+ compiler .*false does not run"):
        made(make_params())


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo broken 1.0;; *) echo "no memory left"; exit 3;; esac\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(RuntimeError, match=r"fails with status 3:\nno memory left"):
        tiger(backend="compiled")(make_params())


def test_what_a_compiler_makes_is_checked(monkeypatch):
    """A library for another rule, as it would come out of a cache that somebody has mixed up."""
    made = tiger(backend="compiled")
    true = compiler.unit_of
    monkeypatch.setattr(compiler, "unit_of", lambda struct, isa: true(struct, isa).replace("sign(", "magnitude("))
    with pytest.raises(
        optim_ext.RuleError, match="compiled it differs from interpreted in torch.float64 at step 1, in param"
    ):
        made(make_params())


def test_a_rule_is_compiled_ahead_by_its_class_and_then_found():
    made = tiger(backend="interpreted")
    made.compile()
    assert made._variant_with({}).compiled
    with pytest.raises(ValueError, match="device is 'tpu'"):
        made.compile("tpu")


def run(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPTIM_EXT_RULES": "auto", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


MODULE = """
import optim_ext

@optim_ext.rule
def Plain(param, grad, *, lr=0.1, twice=False):
    return param - lr * grad * (2 if twice else 1)
"""


def test_the_command_line_compiles_ahead(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    cache = tmp_path / "cache"
    done = run("-m", "optim_ext", "compile", "mine:Plain", "twice=True", cwd=tmp_path, OPTIM_EXT_CACHE=str(cache))
    assert (done.returncode, done.stdout) == (0, f"mine:Plain: compiled, in {cache}\n"), done.stderr
    assert len([*cache.glob("*.rule")]) == 1
    code = (
        "import torch, mine; p = torch.nn.Parameter(torch.ones(2)); o = mine.Plain([p], twice=True); o._definition.backend; \
from optim_ext._rules.compiler import compile_now; import os; os.environ['PATH'] = os.environ['PATH']; \
compile_now(o._variant(o.param_groups[0])); print(o._variant(o.param_groups[0]).compiled)"
    )
    before = sorted(cache.glob("*.rule"))
    done = run("-c", code, cwd=tmp_path, OPTIM_EXT_CACHE=str(cache))
    assert done.stdout == "True\n", done.stderr
    assert sorted(cache.glob("*.rule")) == before


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "usage: python -m optim_ext compile pkg.mod:Name"),
        (["mine"], 2, "'mine' is neither pkg.mod:name nor FILE.py:name"),
        (["mine:Nothing"], 2, "has no attribute 'Nothing'"),
        (["mine:optim_ext"], 2, "optim_ext of mine is no rule"),
        (["nothing:X"], 2, "No module named 'nothing'"),
        (["mine:Plain", "thrice=True"], 1, "Plain has no option 'thrice'"),
    ],
)
def test_the_command_line_says_what_it_does_not_understand(with_optim_ext, tmp_path, arguments, status, words):
    (tmp_path / "mine.py").write_text(MODULE)
    done = with_optim_ext.run_module("optim_ext", "compile", *arguments, cwd=tmp_path)
    assert done.returncode == status and words in done.stderr, done.stderr


def test_a_child_of_fork_steps_on(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    code = """
import os, torch, mine
p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
o = mine.Plain([p]); o.step()
child = os.fork()
if child == 0:
    o.step()
    q = torch.nn.Parameter(torch.ones(2)); q.grad = torch.ones(2)
    mine.Plain([q], twice=True).step()
    os._exit(0 if abs(p[0].item() - 0.8) < 1e-6 and abs(q[0].item() - 0.8) < 1e-6 else 1)
print(os.waitpid(child, 0)[1])
"""
    done = run("-c", code, cwd=tmp_path, OPTIM_EXT_CACHE=str(tmp_path / "cache"))
    assert done.stdout == "0\n", done.stderr


def test_a_process_ends_while_its_compiler_runs(tmp_path):
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\ncase "$*" in *--version*) echo slow 1.0;; *) sleep 60;; esac\n')
    slow.chmod(0o755)
    (tmp_path / "mine.py").write_text(MODULE)
    code = """
import torch, mine, time
p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
mine.Plain([p]).step(); time.sleep(1)
"""
    began = time.monotonic()
    done = run("-c", code, cwd=tmp_path, OPTIM_EXT_CACHE=str(tmp_path / "cache"), CXX=str(slow))
    assert done.returncode == 0 and time.monotonic() - began < 55, done.stderr


def test_headers_are_where_include_paths_says():
    (folder,) = optim_ext.include_paths()
    assert (Path(folder) / "rules/rule.h").exists() and (Path(folder) / "kernels/cpu/one_rule.h").exists()
