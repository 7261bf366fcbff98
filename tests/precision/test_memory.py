"""The table of bytes is what parameters, gradients and state really take after a step, and nothing is made for it."""

import itertools

import pytest
import torch
from kept import SHAPES, TAKING, shapes_for
from lockstep import copy_of, random
from specs import SPECS

import optim_ext as optim
from optim_ext.swa_utils import AveragedModel

EVERY_WAY = list(
    itertools.product(
        ("native", "master", "remainder", "kahan", "stochastic", "auto"), ("native", "fp32", "bf16", "q8")
    )
)


def held(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor))


def held_after_a_step(cls, groups, **options):
    """(parameters, gradients, state) of each group."""
    optimizer = cls(groups, **copy_of(options))
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = random(p.shape, p.dtype, 3) if p.requires_grad else None
    optimizer.step()
    found = []
    for group in optimizer.param_groups:
        params = group["params"]
        state = [value for p in params for value in optimizer.state.get(p, {}).values()]
        found.append((held(params), held(p.grad for p in params), held(state)))
    return found


def parameters(dtype=torch.bfloat16, shapes=SHAPES):
    return [torch.nn.Parameter(random(shape, dtype, i)) for i, shape in enumerate(shapes)]


def numbers(row):
    return [(group.params, group.grads, group.state) for group in row.groups]


@pytest.mark.parametrize("spec", TAKING, ids=lambda spec: spec.name)
def test_every_way_is_what_a_step_leaves(spec):
    shapes = shapes_for(spec)
    table = optim.memory(parameters(shapes=shapes), spec.ours, **copy_of(spec.typical))
    assert [(row.param_precision, row.state_precision) for row in table.rows] == EVERY_WAY
    for row in table.rows:
        way = {"param_precision": row.param_precision, "state_precision": row.state_precision}
        assert numbers(row) == held_after_a_step(spec.ours, parameters(shapes=shapes), **spec.typical, **way), way


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_every_set_of_options(spec, dtype):
    as_it_comes = {"param_precision": "native", "state_precision": "native"} if spec in TAKING else {}
    for options in spec.grid:
        (row,) = optim.memory(parameters(dtype), spec.ours, **copy_of(options), **as_it_comes).rows
        assert numbers(row) == held_after_a_step(spec.ours, parameters(dtype), **options), options


@optim.rule(("velocity", "slow"), backend="interpreted", state_dtype=torch.float32)
def Drift(param, grad, velocity, slow, *, step, lr=1e-3):
    velocity = 0.9 * velocity + grad
    return param - lr * velocity, velocity, slow + param


@optim.rule(("velocity", "slow"), backend="interpreted")
def Kept(param, grad, velocity, slow, *, step, lr=1e-3):
    velocity = 0.9 * velocity + grad
    return param - lr * velocity, velocity, slow + param


@pytest.mark.about_the_cpu("interpreted rules take param_precision and state_precision there only")
def test_a_rule_of_ones_own():
    (row,) = optim.memory(parameters(), Drift).rows
    assert numbers(row) == held_after_a_step(Drift, parameters())
    rows = optim.memory(parameters(), Kept).rows
    assert {row.param_precision for row in rows} > {"native", "master", "kahan"}
    for row in rows:
        way = {"param_precision": row.param_precision, "state_precision": row.state_precision}
        assert numbers(row) == held_after_a_step(Kept, parameters(), **way), way


@pytest.mark.parametrize("size", [0, 1, 6400, 6401])
def test_how_large_a_tensor_must_be_for_8_bits(size):
    asked = {"state_precision": "q8", "min_q8_size": size}
    for row in optim.memory(parameters(), optim.AdamW, **asked).rows:
        way = {"param_precision": row.param_precision, **asked}
        assert numbers(row) == held_after_a_step(optim.AdamW, parameters(), **way)


def test_parameters_in_another_memory_order():
    def params():
        p = torch.randn(32, 8, 3, 3).bfloat16()
        return [torch.nn.Parameter(p.to(memory_format=torch.channels_last)), torch.nn.Parameter(p[..., 0].mT)]

    for row in optim.memory(params(), optim.AdamW, min_q8_size=1).rows:
        way = {"param_precision": row.param_precision, "state_precision": row.state_precision}
        assert numbers(row) == held_after_a_step(optim.AdamW, params(), min_q8_size=1, **way), way


def test_groups_with_options_of_their_own_and_parameters_without_gradients():
    def groups():
        params = parameters(shapes=((64, 100), (64, 100), (64, 100), (9,)))
        params[1].requires_grad_(False)
        return [
            {"params": params[:2], "state_precision": "q8"},
            {"params": iter(params[2:]), "param_precision": "kahan"},
        ]

    for row in optim.memory(groups(), optim.AdamW, amsgrad=True).rows:
        way = {"param_precision": row.param_precision, "state_precision": row.state_precision}
        assert numbers(row) == held_after_a_step(optim.AdamW, groups(), amsgrad=True, **way), way
    for row in optim.memory(groups(), optim.Adagrad).rows:
        way = {"param_precision": row.param_precision, "state_precision": row.state_precision}
        assert numbers(row) == held_after_a_step(optim.Adagrad, groups(), **way), way


@pytest.mark.about_the_cpu("elsewhere tests make no model on the meta device")
def test_a_model_on_the_meta_device_and_nothing_is_made_or_changed():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.LayerNorm(200)).bfloat16()
    table = optim.memory(model, optim.AdamW)
    assert all(p.device.type == "meta" and p.grad is None for p in model.parameters())
    real = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.LayerNorm(200)).bfloat16()
    before = [p.detach().clone() for p in real.parameters()]
    assert optim.memory(real, optim.AdamW) == table
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(real.parameters(), before, strict=True))
    assert numbers(table.rows[0]) == held_after_a_step(optim.AdamW, real.parameters())


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_implementations_of_torch_take_the_same(options):
    for cls, dtype in itertools.product((optim.AdamW, optim.Adagrad), (torch.float32, torch.bfloat16)):
        expected = held_after_a_step(cls, parameters(dtype), **options)
        (row, *_) = optim.memory(parameters(dtype), cls, **options).rows
        assert numbers(row) == expected
        (row, *_) = optim.memory([{"params": parameters(dtype), **options}], cls).rows
        assert numbers(row) == expected


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_averages_count_where_they_are_asked_for(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20)).bfloat16()
    averaged = AveragedModel(model, dtype=dtype).module
    expected = held([*averaged.parameters(), *averaged.buffers()])
    without = optim.memory(model, optim.AdamW)
    table = optim.memory(model, optim.AdamW, average=dtype or True)
    for row, other in zip(table.rows, without.rows, strict=True):
        assert (row.average, other.average) == (expected, 0)
        assert row.total == other.total + expected
    assert optim.memory(model.parameters(), optim.AdamW, average=True).rows[0].average == held(model.parameters())


def test_of_a_float32_model_only_the_state_can_be_kept_otherwise():
    table = optim.memory(parameters(torch.float32), optim.AdamW)
    assert [row.param_precision for row in table.rows] == ["native"] * 4
    assert table.rows[3].total < table.rows[0].total


def test_ways_that_are_refused_say_why():
    table = optim.memory([("half", parameters(torch.float16)[1])], optim.AdamW)
    refused = {(row.param_precision, row.state_precision): row for row in table.rows if row.refused}
    assert {param for param, _ in refused} == {"remainder", "stochastic"}
    for row in refused.values():
        assert row.groups == () and row.total == 0
        assert f"parameter 'half': param_precision='{row.param_precision}' is for bfloat16" in row.refused
    assert "refused: parameter 'half'" in str(table)
    with pytest.raises(ValueError, match="parameter 'half': param_precision='remainder' is for bfloat16"):
        optim.memory([("half", parameters(torch.float16)[1])], optim.AdamW, param_precision="remainder")


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (torch.optim.AdamW, {}, TypeError, "found AdamW; use optim_ext.AdamW"),
        (optim.LBFGS, {}, TypeError, "keeps state for each parameter, found LBFGS$"),
        (optim.AdamW, {"lr": -1.0}, ValueError, "Invalid learning rate"),
        (optim.AdamW, {"state_precision": "q4"}, ValueError, "state_precision is 'q4'"),
        ("AdamW", {}, TypeError, "found 'AdamW'"),
    ],
)
def test_what_there_is_no_table_of(cls, options, error, message):
    with pytest.raises(error, match=message):
        optim.memory(parameters(), cls, **options)


def test_parameters_that_have_no_shape_yet():
    with pytest.raises(ValueError, match="parameter 'weight' has no shape yet"):
        optim.memory(torch.nn.LazyLinear(3), optim.AdamW)


def test_the_text_is_a_table():
    groups = [{"params": parameters(shapes=((64, 100),))}, {"params": parameters(shapes=((3,),))}]
    lines = str(optim.memory(groups, optim.AdamW, param_precision="remainder", average=torch.float32)).splitlines()
    assert lines[0] == "AdamW, 6,403 elements in parameters; bytes"
    assert lines[1].split() == (
        "param_precision state_precision parameters gradients state group 0 group 1 average in all an element".split()
    )
    assert lines[2].split()[:4] == ["remainder", "native", "12,806", "12,806"]
    assert len({len(line) for line in lines[1:]}) == 1 and len(lines) == 6


FACTORY = """
import torch
from beside import WIDTH

def model():
    assert torch.get_default_device().type == "meta"
    return torch.nn.Linear(WIDTH, 64, bias=False).bfloat16()

def reads():
    return [torch.nn.Parameter(torch.ones(3)) * torch.ones(3).sum().item()]
"""


@pytest.fixture
def command(tmp_path, with_optim_ext):
    (tmp_path / "mine.py").write_text(FACTORY)
    (tmp_path / "beside.py").write_text("WIDTH = 100")

    def run(*arguments):
        words = [word.replace("@", str(tmp_path)) for word in arguments]
        return with_optim_ext.run_module("optim_ext", "memory", *words, cwd=tmp_path.parent)

    return run


def test_the_command_prints_the_table(command):
    done = command("@/mine.py:model", "--optimizer", "SGD", "momentum=0.9", "param_precision=remainder")
    assert done.returncode == 0, done.stderr
    with torch.device("meta"):
        model = torch.nn.Linear(100, 64, bias=False).bfloat16()
    assert done.stdout == f"{optim.memory(model, optim.SGD, momentum=0.9, param_precision='remainder')}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["@/mine.py"], 2, "is neither pkg.mod:name nor FILE.py:name"),
        (["@/mine.py:other"], 2, "has no attribute 'other'"),
        (["@/none.py:model"], 2, "No such file"),
        (["@/mine.py:model", "--optimizer", "Ada"], 2, "has no attribute 'Ada'"),
        (["@/mine.py:model", "momentum"], 2, "'momentum' is no option=value"),
        (["@/mine.py:model", "momentum=0.9"], 1, "unexpected keyword argument 'momentum'"),
        (["@/mine.py:reads"], 1, "--device cpu makes it for real"),
    ],
)
def test_what_the_command_says_of_words_it_does_not_understand(command, arguments, status, message):
    done = command(*arguments)
    assert done.returncode == status and message in done.stderr, done.stderr
