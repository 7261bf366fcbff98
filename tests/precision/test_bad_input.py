"""What cannot be kept as asked is refused by name, before anything is written."""

import pytest
import torch
from kept import everything, same

import optim_ext as optim
from optim_ext._load import _C
from optim_ext._tables import TABLES


def parameter(*shape, dtype=torch.bfloat16):
    p = torch.nn.Parameter(torch.ones(*shape, dtype=dtype))
    p.grad = torch.ones_like(p)
    return p


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"param_precision": "double"}, "param_precision is 'double', expected one of 'native', 'master'"),
        ({"param_precision": None}, "param_precision is None"),
        ({"state_precision": "q4"}, "state_precision is 'q4', expected one of 'native', 'fp32', 'bf16', 'q8'"),
        ({"state_precision": {"exp_avg": "q4"}}, "state_precision of 'exp_avg' is 'q4'"),
        ({"rounding_seed": -1}, "rounding_seed is -1"),
        ({"min_q8_size": 1.5}, "min_q8_size is 1.5"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        optim.AdamW([parameter(4)], **options)
    with pytest.raises(ValueError, match=message):
        optim.AdamW([{"params": [parameter(4)], **options}])


def test_state_that_the_class_does_not_have():
    with pytest.raises(ValueError, match="names 'square_avg', which is no state of AdamW; it has 'exp_avg'"):
        optim.AdamW([parameter(4)], state_precision={"square_avg": "q8"})


@pytest.mark.parametrize("precision", ["remainder", "stochastic"])
def test_float16_with_what_only_bfloat16_can_do(precision):
    named = [("layer.weight", parameter(4, dtype=torch.float16))]
    with pytest.raises(ValueError, match="parameter 'layer.weight': param_precision=.* is for bfloat16"):
        optim.AdamW(named, param_precision=precision)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64], ids=str)
def test_state_of_few_bits_for_complex_and_double(dtype):
    with pytest.raises(ValueError, match="parameter 0 of group 0: state_precision='q8'"):
        optim.AdamW([parameter(64, 64, dtype=dtype)], state_precision="q8")


def test_a_class_that_does_not_take_the_options_yet():
    with pytest.raises(TypeError, match="unexpected keyword argument 'param_precision'"):
        optim.LBFGS([parameter(4, 4)], param_precision="master")


def test_a_group_that_was_refused_is_not_added():
    optimizer = optim.AdamW([parameter(4)])
    with pytest.raises(ValueError, match="param_precision"):
        optimizer.add_param_group({"params": [parameter(4)], "param_precision": "double"})
    assert len(optimizer.param_groups) == 1


def test_options_changed_later_are_looked_at_by_the_next_step():
    p = parameter(4)
    optimizer = optim.AdamW([p], param_precision="master")
    optimizer.step()
    before = everything(optimizer)
    optimizer.param_groups[0]["param_precision"] = "double"
    with pytest.raises(ValueError, match="group 0: param_precision is 'double'"):
        optimizer.step()
    assert same(before, everything(optimizer))


@pytest.mark.about_the_cpu("elsewhere a capturable step is native")
def test_a_group_that_takes_torchs_code():
    p = parameter(4)
    optimizer = optim.AdamW([p], param_precision="master", capturable=True)
    with pytest.raises(RuntimeError, match="param_precision='master' of group 0 needs a native step"):
        optimizer.step()
    assert p.eq(1).all() and not optimizer.state


@pytest.mark.parametrize("replaced", [lambda value: value[:2], torch.Tensor.double], ids=["shape", "dtype"])
def test_a_master_of_another_kind_is_none(replaced):
    """It is made anew of the parameter."""
    p = parameter(4)
    optimizer = optim.AdamW([p], param_precision="master")
    optimizer.step()
    optimizer.state[p]["master_param"] = replaced(optimizer.state[p]["master_param"])
    optimizer.step()
    assert optimizer.state[p]["master_param"].dtype is torch.float32
    assert torch.equal(optimizer.state[p]["master_param"].bfloat16(), p)


def test_the_op_refuses_what_does_not_fit():
    """By the name of the list and the place in it."""
    op = torch.ops.optim_ext.sgd_

    def call(params, companions, momentum=0.0):
        grads = [torch.ones_like(p) for p in params]
        op(params, grads, [], lr=torch.tensor(0.1), momentum=momentum, dampening=0.0, weight_decay=0.0, nesterov=False,
           maximize=False, is_first_step=False, companions=companions)  # fmt: skip

    p = torch.ones(4, dtype=torch.bfloat16)
    for companions, message in [
        ([torch.zeros(3)], r"companions\[0\]\[0\] has shape \[3\], expected its parameter's shape \[4\]"),
        (
            [torch.zeros(4, dtype=torch.float64)],
            r"has dtype Double, expected Float, BFloat16 or, beside BFloat16, Short",
        ),
        ([torch.zeros(4, dtype=torch.uint8)], r"belongs to no state in 8 bits"),
        ([torch.zeros(2, dtype=torch.int64)], r"has shape \[2\], expected 3 numbers"),
        ([torch.zeros(8)[::2]], r"strides \[2\], expected its parameter's memory order"),
        ([torch.zeros(1).expand(4)], r"share memory"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call([p], companions)
        assert p.eq(1).all()
    with pytest.raises(ValueError, match="there must be as many of each kind"):
        call([p, p.clone()], [torch.ones(4)])
    with pytest.raises(RuntimeError, match="dtype Float, which needs nothing besides itself"):
        call([torch.ones(4)], [torch.ones(4)])
    assert p.eq(1).all()


def test_which_ops_take_companions():
    # Rules written in Python have tables of their own, which other tests may have made.
    assert all(TABLES[op].takes_companions for op in _C.step_ops())
