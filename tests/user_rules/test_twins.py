"""Our own rules, written again in Python: the bits of the built-in ones."""

import pytest
import torch
from kernels.test_bits import capabilities, in_process
from lockstep import bits, copy_of, give_grads, make_params, native_ops, twin
from user_rules.twins import TWIN_CASES, TWINS

import optim_ext

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def pair(case, dtype=torch.float32, params=None, **more):
    """The built-in optimizer, and what was written again, over equal parameters."""
    params = make_params(dtype=dtype) if params is None else params
    of, twins = TWINS[case.spec.name], twin(params)
    ours = case.spec.ours(params, **copy_of(case.options), **more)
    written = of.made(twins, **{**copy_of(case.options), **of.adapted(case.options)}, **more)
    return (ours, params), (written, twins)


def assert_same_bits(ours, written, what=""):
    (optimizer, params), (other, twins) = ours, written
    for index, (param, twin_) in enumerate(zip(params, twins, strict=True)):
        assert bits(param) == bits(twin_), f"{what}parameter {index}"
        mine, its = optimizer.state.get(param, {}), other.state.get(twin_, {})
        for key in mine.keys() & its.keys() - {"step"}:
            assert bits(mine[key]) == bits(its[key]), f"{what}state {key} of {index}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("twin_case", TWIN_CASES, ids=[case.id for case in TWIN_CASES])
def test_a_rule_written_again_has_the_bits_of_the_built_in_one(twin_case, dtype):
    ours, written = pair(twin_case, dtype)
    for step in range(4):
        for optimizer, params in (ours, written):
            give_grads(params, step)
            optimizer.step()
    assert_same_bits(ours, written)


def test_every_element_wise_rule_and_every_rule_of_norms_is_written_again():
    """Those that are left out work on matrices, on rows and columns, or on sparse gradients."""
    assert TWINS.keys() == {
        "SGD",
        "Adam",
        "AdamW",
        "RMSprop",
        "Adagrad",
        "Adadelta",
        "Adamax",
        "NAdam",
        "RAdam",
        "Rprop",
        "ASGD",
        "Lion",
        "LAMB",
        "LARS",
    }
    assert {case.spec.name for case in TWIN_CASES} == TWINS.keys()


TYPICAL = [next(case for case in TWIN_CASES if case.spec.name == name and len(case.options) > 1) for name in TWINS]


@pytest.mark.parametrize("twin_case", TYPICAL, ids=[case.spec.name for case in TYPICAL])
def test_a_rule_is_one_op_from_its_first_step(twin_case):
    _, (optimizer, params) = pair(twin_case)
    give_grads(params, 0)
    assert native_ops(optimizer.step) == ["optim_ext::rule_"]


@pytest.mark.parametrize("twin_case", TYPICAL, ids=[case.spec.name for case in TYPICAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_scales_and_factors_have_the_bits_of_the_built_in_rules(twin_case, dtype):
    """Strided memory, long tensors, a step that unscales and clips: everything that is between memory and a rule."""
    wide = torch.randn(90, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    params = [
        torch.nn.Parameter(wide.clone()),
        torch.nn.Parameter(wide.t().contiguous().t()),
        torch.nn.Parameter(torch.stack([wide] * 3, -1)[..., 1]),
        torch.nn.Parameter(torch.stack([wide[:, :5]] * 3, -1)[..., 1]),
        torch.nn.Parameter(torch.cat([wide.flatten()] * 11)),
    ]
    ours, written = pair(twin_case, params=params)
    for step in range(3):
        for optimizer, own in (ours, written):
            give_grads(own, step)
            if step == 1:
                optimizer.clip_grad_norm(0.5)
            optimizer.step()
    assert_same_bits(ours, written)
    for optimizer, own in (ours, written):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        for group in optimizer.param_groups:
            group["fused"] = True
        give_grads(own, 7)
        optimizer.step()
    assert_same_bits(ours, written, "unscaled: ")
    assert bits(ours[1][0].grad) == bits(written[1][0].grad)


ISA_CHILD = """
import json, sys
import torch
from user_rules.test_twins import TYPICAL, DTYPES, pair, assert_same_bits, give_grads
from optim_ext import _C

for case in TYPICAL:
    for dtype in DTYPES:
        if case.spec.takes(dtype):
            ours, written = pair(case, dtype)
            for step in range(3):
                for optimizer, params in (ours, written):
                    give_grads(params, step)
                    optimizer.step()
            assert_same_bits(ours, written, f"{case.id} {dtype}: ")
json.dump({"isa": _C.isa()}, sys.stdout)
"""


@pytest.mark.parametrize("capability", capabilities())
def test_every_instruction_set_gives_these_bits(capability):
    expected = {"default": "baseline", "avx2": "avx2", "avx512": "avx512"}
    assert in_process(ISA_CHILD, ATEN_CPU_CAPABILITY=capability, OMP_NUM_THREADS="1") == {"isa": expected[capability]}


@pytest.mark.parametrize("twin_case", TYPICAL, ids=[case.spec.name for case in TYPICAL])
def test_an_average_follows_with_the_bits_of_the_built_in_rules(twin_case):
    results = []
    for made in range(2):
        torch.manual_seed(3)
        model = torch.nn.Linear(30, 20)
        averaged = optim_ext.swa_utils.AveragedModel(model)
        of = TWINS[twin_case.spec.name]
        optimizer = (
            twin_case.spec.ours(model.parameters(), **copy_of(twin_case.options))
            if made == 0
            else of.made(model.parameters(), **{**copy_of(twin_case.options), **of.adapted(twin_case.options)})
        )
        optimizer.average_into(averaged)
        for step in range(3):
            give_grads(model.parameters(), step)
            optimizer.step()
        results.append([bits(p) for p in averaged.parameters()])
    assert results[0] == results[1]
