"""average_into: a step with it is the step and then update_parameters(), bit for bit."""

import copy
import pickle

import pytest
import torch
from lockstep import bits, copy_of, native_ops
from specs import SPECS
from torch import nn

import optim_ext
from optim_ext import swa_utils

WARM = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(swa_utils.get_warmup_decay(0.99))}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 60), nn.BatchNorm1d(60), nn.ReLU(), nn.Linear(60, 90), nn.Linear(90, 2)).to(dtype)


class Both:
    """The same training twice: averaging within the step, and after it."""

    def __init__(self, make, model=None, averaging=WARM, parts=lambda model: model.parameters(), **options):
        self.models = [network() if model is None else copy.deepcopy(model) for _ in range(2)]
        self.averages = [swa_utils.AveragedModel(m, **averaging, **options) for m in self.models]
        self.optimizers = [make(parts(m)) for m in self.models]
        self.optimizers[0].average_into(self.averages[0])

    def step(self, count=1, frozen=(), change=lambda model, optimizer: None):
        for _ in range(count):
            for at, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
                generator = torch.Generator().manual_seed(7)
                for i, p in enumerate(model.parameters()):
                    grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
                    p.grad = None if i in frozen or not p.requires_grad else grad
                for b in model.buffers():
                    b.add_(1)
                change(model, optimizer)
                optimizer.step()
                if at == 1:
                    self.averages[1].update_parameters(model)
        return self

    def check(self):
        for pair in (self.models, self.averages):
            mine, other = (module.state_dict() for module in pair)
            for name in other:
                assert bits(mine[name]) == bits(other[name]), name
        states = [[bits(v) for e in o.state.values() for v in e.values()] for o in self.optimizers]
        assert states[0] == states[1]
        return self


def adamw(params, **options):
    return optim_ext.AdamW(params, lr=0.01, **options)


@pytest.mark.parametrize("use_buffers", [False, True], ids=["", "buffers"])
@pytest.mark.parametrize(
    "model_dtype, dtype",
    [(torch.float32, None), (torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, None)],
    ids=str,
)
@pytest.mark.parametrize(
    "row", [s for s in SPECS if s.name in ("SGD", "AdamW", "RMSprop", "NAdam")], ids=lambda s: s.id
)
def test_equals_step_then_update(row, model_dtype, dtype, use_buffers):
    options = {**row.typical, **(row.half_options if model_dtype == torch.float16 else {})}
    Both(
        lambda params: row.ours(params, **copy_of(options)), network(model_dtype), dtype=dtype, use_buffers=use_buffers
    ).step(5).check()


@pytest.mark.parametrize("row", SPECS, ids=lambda s: s.id)
def test_every_optimizer(row):
    Both(lambda params: row.ours(params, **copy_of(row.typical)), averaging={}).step(3).check()


def test_one_call_besides_the_buffers():
    both = Both(adamw).step(2)
    assert native_ops(both.optimizers[0].step) == ["optim_ext::adamw_"]
    assert both.averages[0].n_averaged.item() == 3


def test_parameters_without_gradients_and_of_others():
    """Frozen for a step, never trained, and not the optimizer's: the average follows all of them."""
    model = network()
    model[3].weight.requires_grad_(False)
    both = Both(adamw, model, parts=lambda m: [*m[0].parameters(), *m[3].parameters(), m[1].weight])
    both.step(2).check().step(2, frozen=(0, 2)).check().step(2).check().step(1, frozen=range(20)).check()
    outside = [both.averages[0].module[4].weight, both.models[0][4].weight]
    assert torch.equal(*outside)


def test_update_every():
    both = Both(adamw, update_every=3).step(8).check()
    assert both.averages[0].n_averaged.item() == 3


def test_groups_closures_and_changed_options():
    def parts(model):
        return [
            {"params": model[0].parameters()},
            {"params": [*model[1].parameters(), *model[3].parameters()], "lr": 0.1},
        ]

    def schedule(model, optimizer):
        optimizer.param_groups[1]["lr"] *= 0.5

    Both(adamw, parts=parts).step(2, change=schedule).check().step(1, change=lambda m, o: m.zero_grad()).check()


def test_a_group_that_takes_torchs_code():
    def gradients(model, optimizer):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.1 * i)

    both = Both(lambda params: optim_ext.SGD(params, lr=0.1, differentiable=True), network().requires_grad_(False))
    assert not any(report.native for report in optim_ext.explain(both.optimizers[0]))
    both.step(3, change=gradients).check()
    assert both.averages[0].n_averaged.item() == 3


@pytest.mark.parametrize("sparse_first", [True, False])
def test_sparse_gradients(sparse_first):
    def change_to_sparse(model, optimizer):
        model[0].weight.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 4), (60, 4))

    def leave_dense(model, optimizer): ...

    both = Both(lambda params: optim_ext.SGD(params, lr=0.1))
    for change in (change_to_sparse, leave_dense) * 2 if sparse_first else (leave_dense, change_to_sparse) * 2:
        both.step(1, change=change).check()


def test_a_parameter_listed_twice():
    with pytest.warns(UserWarning, match="duplicate"):
        both = Both(adamw, parts=lambda m: [m[0].weight, m[0].bias, m[0].weight])
    both.step(3).check()


def test_strided_parameters_and_gradients():
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)

    def other_strides(model, optimizer):
        model.weight.grad = model.weight.grad.contiguous()

    both = Both(adamw, model)
    both.averages[0].module.weight.data = both.averages[0].module.weight.data.contiguous()
    both.step(3, change=other_strides).check()


@pytest.mark.parametrize("skip", [False, True])
def test_found_inf(skip):
    both = Both(lambda params: adamw(params, fused=True)).step(2)
    before = [bits(t) for t in both.averages[0].state_dict().values()]

    def scaled(model, optimizer):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(skip))

    both.step(1, change=scaled)
    if skip:
        assert [bits(t) for t in both.averages[0].state_dict().values()] == before
    else:
        both.check()


def test_state_is_loaded_in_the_middle():
    both = Both(adamw).step(3)
    for at in range(2):
        both.averages[at].load_state_dict(copy.deepcopy(both.averages[at].state_dict()))
        both.optimizers[at].load_state_dict(copy.deepcopy(both.optimizers[at].state_dict()))
        both.models[at].load_state_dict(copy.deepcopy(both.models[at].state_dict()))
    both.step(3).check()


def test_replaced_average_tensors_are_followed():
    both = Both(adamw).step(2)
    for averaged in both.averages:
        averaged.module[0].weight = nn.Parameter(torch.ones(60, 4))
        averaged.module[4].weight.data = torch.full((2, 90), 2.0)
    both.step(2).check()


LONG = (20_000, 4)  # more than is averaged at a time


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "make, shape, expands",
    [
        (adamw, LONG, True),
        (lambda params: optim_ext.SGD(params, lr=0.1, momentum=0.9), LONG, True),
        (lambda params: optim_ext.Adafactor(params, lr=0.1), (64, 64, 3, 3), False),
        (lambda params: optim_ext.Adafactor(params, lr=0.1), (5000, 8), False),
    ],
    ids=["AdamW", "SGD", "Adafactor, convolution", "Adafactor, narrow"],
)
def test_operands_that_repeat_are_walked_as_the_average_is(make, shape, expands, threads):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(shape))

    def expand(model, optimizer):
        if expands:
            model.weight.grad = model.weight.grad[:1].expand(shape)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        Both(make, model).step(2, change=expand).check()
    finally:
        torch.set_num_threads(before)


def test_compiled_step_that_is_skipped():
    both = Both(lambda params: optim_ext.AdamW(params, lr=0.01, fused=True))
    scales = iter([0.0, 0.0, 1.0, 1.0, 0.0])

    def skip(model, optimizer):
        if optimizer is both.optimizers[0]:
            skip.found_inf = next(scales)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(skip.found_inf)

    both.optimizers[1].average_into(both.averages[1])
    both.averages[1].update_parameters = lambda model: None  # the eager step averages, too
    both.optimizers[0].step = torch.compile(both.optimizers[0].step, backend="eager")
    both.step(5, change=skip).check()
    assert both.averages[0].n_averaged == 3


def test_a_buffer_that_changed_its_shape_is_found_before_the_step():
    both = Both(adamw).step(2)
    both.models[0][1].running_mean.data = torch.zeros(61)
    before = [bits(p) for p in (*both.models[0].parameters(), *both.averages[0].parameters())]
    for fails in (both.optimizers[0].step, lambda: both.averages[0].update_parameters(both.models[0])):
        with pytest.raises(ValueError, match="running_mean"):
            fails()
    assert before == [bits(p) for p in (*both.models[0].parameters(), *both.averages[0].parameters())]


def test_compiled_step():
    both = Both(adamw)
    eager = both.optimizers[0].step
    both.optimizers[0].step = torch.compile(eager, backend="eager")
    both.step(3).check()


def test_an_error_leaves_everything_as_it_was():
    both = Both(adamw).step(2)
    model, averaged, optimizer = both.models[0], both.averages[0], both.optimizers[0]
    model[0].weight.grad = torch.ones(60, 4)
    averaged.module[3].bias.data = torch.zeros(89)
    kept = [bits(t) for m in (model, averaged) for t in m.state_dict().values()]
    with pytest.raises(RuntimeError, match=r"parameter 5 of group 0: averages has shape \[89\]"):
        optimizer.step()
    assert [bits(t) for m in (model, averaged) for t in m.state_dict().values()] == kept
    averaged.module[3].bias.data = torch.zeros(90)
    optimizer.step()
    assert averaged.n_averaged.item() == 3


def test_copies_are_not_attached():
    both = Both(adamw).step(1)
    for twin in (pickle.loads(pickle.dumps(both.optimizers[0])), copy.deepcopy(both.optimizers[0])):
        assert twin._asked().averaging is None
    averaged = pickle.loads(pickle.dumps(both.averages[0]))
    with pytest.raises(ValueError, match="the model behind this average is not known"):
        both.optimizers[0].average_into(averaged)
    both.optimizers[0].average_into(averaged, both.models[0])
    both.averages[0] = averaged
    both.step(2).check()


def test_detached():
    both = Both(adamw).step(2)
    both.optimizers[0].average_into(None)
    before = both.averages[0].n_averaged.item()
    both.optimizers[0].step()
    assert both.averages[0].n_averaged.item() == before
    another = adamw(both.models[0].parameters())
    another.average_into(both.averages[0])


def test_refused():
    model = network()
    averaged = swa_utils.AveragedModel(model)
    optimizer = adamw(model.parameters())
    with pytest.raises(TypeError, match="this is torch.optim.swa_utils.AveragedModel; use optim_ext.swa"):
        optimizer.average_into(torch.optim.swa_utils.AveragedModel(model))
    with pytest.raises(ValueError, match="has an avg_fn or multi_avg_fn of its own"):
        optimizer.average_into(swa_utils.AveragedModel(model, avg_fn=lambda a, p, n: a))
    with pytest.raises(ValueError, match="none of the optimizer's parameters"):
        adamw(network().parameters()).average_into(averaged)
    with pytest.raises(ValueError, match="has shape"):
        optimizer.average_into(averaged, nn.Sequential(*network()[:4], nn.Linear(90, 3)))
    optimizer.average_into(averaged)
    with pytest.raises(ValueError, match="another optimizer updates this average"):
        adamw(model.parameters()).average_into(averaged)
