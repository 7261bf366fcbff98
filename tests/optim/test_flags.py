"""foreach, fused, differentiable, capturable, sparse gradients, and what explain() says about each."""

import pytest
import torch
from lockstep import Lockstep, give_grads, make_params, native_ops, snapshot
from specs import SPECS

import optim_ext

FUSED = [spec for spec in SPECS if spec.fused]
SPARSE = [spec for spec in SPECS if spec.sparse is not None]


def name(spec):
    return spec.name


def test_explain_native(case):
    for flags in case.spec.flags:
        if flags.get("foreach") and any(isinstance(v, torch.Tensor | tuple) for v in case.options.values()):
            continue
        params = make_params()
        optimizer = case.spec.ours([{"params": params[:2]}, {"params": params[2:]}], **case.options, **flags)
        for give in (False, True):
            if give:
                give_grads(params, 0)
            reports = optim_ext.explain(optimizer)
            assert [(report.group, report.native) for report in reports] == [(0, True), (1, True)]
            assert all(isinstance(report.reason, str) and str(report) for report in reports)


def test_explain_is_only_a_look(spec):
    params = make_params()
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    optim_ext.explain(optimizer)
    assert snapshot(optimizer) == before
    fresh = spec.ours(params, **spec.typical)
    keys = len(fresh.state)
    optim_ext.explain(fresh)
    assert len(fresh.state) == keys


def test_explain_an_optimizer_that_is_not_ours():
    (report,) = optim_ext.explain(torch.optim.AdamW(make_params()))
    assert (report.group, report.native) == (0, False)
    assert report.reason == "this is torch.optim.AdamW; use optim_ext.AdamW"
    (report,) = optim_ext.explain(type("Own", (torch.optim.Optimizer,), {})(make_params(), {}))
    assert not report.native and report.reason == "Own has no native step in optim_ext"


class Lookahead(torch.optim.Optimizer):
    """As public wrappers are: an optimizer of its own by class, which shares the groups of the one it steps."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, {}


class SAM(torch.optim.Optimizer):
    def __init__(self, params, base):
        super().__init__(params, {"rho": 0.05})
        self.base_optimizer = base(self.param_groups, lr=0.1)


class ScheduleFree:
    """No optimizer by class."""

    def __init__(self, base):
        self.base = base

    param_groups = property(lambda self: self.base.param_groups)

    def step(self):
        self.base.step()


class Chained:
    def __init__(self, *optimizers):
        self.chained_optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self): ...


WRAPPED = [
    (
        lambda params: Lookahead(optim_ext.AdamW(params)),
        ["AdamW in Lookahead.optimizer: one call of optim_ext::adamw_"],
    ),
    (lambda params: SAM(params, optim_ext.SGD), ["SGD in SAM.base_optimizer: one call of optim_ext::sgd_"]),
    (lambda params: ScheduleFree(optim_ext.Adam(params)), ["Adam in ScheduleFree.base: one call of optim_ext::adam_"]),
    (
        lambda params: Lookahead(ScheduleFree(optim_ext.Adam(params))),
        ["Adam in Lookahead.optimizer.base: one call of optim_ext::adam_"],
    ),
    (
        lambda params: Chained(optim_ext.Lion(params[:2]), torch.optim.SGD(params[2:])),
        [
            "Lion in Chained.chained_optimizers[0]: one call of optim_ext::lion_",
            "SGD in Chained.chained_optimizers[1]: ",
        ],
    ),
]


@pytest.mark.parametrize("make, reasons", WRAPPED)
def test_explain_looks_into_wrappers_and_says_what_it_found(make, reasons):
    reports = optim_ext.explain(make(make_params()))
    assert [report.native for report in reports] == ["optim_ext::" in reason for reason in reasons]
    assert all(report.reason.startswith(reason) for report, reason in zip(reports, reasons, strict=True))


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, optim_ext.SGD])
def test_explain_takes_optimizers_only(thing):
    with pytest.raises(TypeError, match="explain takes an optimizer, or a wrapper that holds one, found"):
        optim_ext.explain(thing)


# But for those of which this torch's fused step leaves most elements as they were (pytorch#191763).
FUSED_STEPS = [
    pytest.param(spec, dtype, id=f"{spec.name}-{dtype}")
    for spec in FUSED
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if spec.fused_writes_all(dtype)
]


@pytest.mark.parametrize(("fused_spec", "dtype"), FUSED_STEPS)
def test_fused_equals_torchs(fused_spec, dtype):
    options = {**fused_spec.typical, **fused_spec.half_options, "fused": True}
    lockstep = Lockstep(fused_spec, options, dtype=dtype).step(5).check()
    assert getattr(lockstep.ours, "_step_supports_amp_scaling", False) == fused_spec.scales_in_step


def test_amp_attribute_only_when_fused(spec):
    """GradScaler and Lightning behave otherwise when they see it."""
    for flags in spec.flags:
        optimizer = spec.ours(make_params(), **flags)
        reference = spec.torch(make_params(), **flags)
        expected = getattr(reference, "_step_supports_amp_scaling", None)
        assert getattr(optimizer, "_step_supports_amp_scaling", None) == expected


@pytest.mark.parametrize("fused_spec", FUSED, ids=name)
def test_fused_on_meta_is_torchs_error_and_leaves_nothing(fused_spec):
    params = [torch.nn.Parameter(torch.empty(3, device="meta"))]
    params[0].grad = torch.empty(3, device="meta")
    optimizer = fused_spec.ours(params, fused=True)
    keys = {id(p): set(e) for p, e in optimizer.state.items()}
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        optimizer.step()
    assert {id(p): set(e) for p, e in optimizer.state.items()} == keys
    if not fused_spec.takes_late_params:
        return
    real = make_params(((3,),))
    optimizer.param_groups[0]["params"] = real
    give_grads(real, 0)
    before = real[0].detach().clone()
    optimizer.step()
    assert not torch.equal(real[0], before)


@pytest.mark.only_for(lambda spec: not spec.reads_numbers, reason="torch reads its numbers")
@pytest.mark.torchs
def test_meta_parameters_take_torchs_path(spec):
    """Shapes without data: torch's code runs on them, so does ours."""
    param = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = spec.ours([param], **{k: v for k, v in spec.typical.items() if k != "momentum"})
    param.grad = torch.empty(3, device="meta")
    assert not optim_ext.explain(optimizer)[0].native
    optimizer.step()
    for entries in optimizer.state.values():
        assert all(v.device.type == "meta" for k, v in entries.items() if k not in spec.numbers)


@pytest.mark.only_for(lambda spec: spec.accepts("capturable"), reason="torch's class does not have the flag")
@pytest.mark.about_the_cpu("where torch refuses the flag")
def test_capturable_on_cpu_is_torchs_error(spec):
    params = make_params(((3,),))
    messages = []
    for make in (spec.torch, spec.ours):
        optimizer = make(params, capturable=True)
        give_grads(params, 0)
        before = params[0].detach().clone()
        with pytest.raises(AssertionError) as caught:
            optimizer.step()
        messages.append(str(caught.value))
        assert torch.equal(params[0], before)
    assert messages[0] == messages[1]


# differentiable=True: torch's path.


def differentiable_step(make, options, through):
    """One differentiable step as a function of the parameter, its gradient and its state."""
    keys = sorted(through)

    def run(param, grad, *state):
        param = param.clone()
        param.grad = grad
        optimizer = make([param], **options, differentiable=True)
        entries = {key: value.clone() for key, value in zip(keys, state, strict=True)}
        numbers = {"mu_product": 0.5, "eta": 0.5, "mu": 1.0}
        entries.update({key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()})
        if "step" in optimizer.state[param] or "step" in through_steps:
            entries["step"] = torch.tensor(10.0, dtype=torch.float64)
        optimizer.state[param].update(entries)
        optimizer.step()
        return (param, *(v for v in optimizer.state[param].values() if v.requires_grad))

    through_steps = {"step"} if make.__name__ != "SGD" else set()
    return run


@pytest.mark.only_for(lambda spec: spec.differentiable, reason="torch's class does not have the flag")
@pytest.mark.torchs
def test_differentiable_gradcheck(spec):
    keys = sorted(spec.tensors(spec.typical))
    param = torch.rand(6, dtype=torch.float64, requires_grad=True)
    grad = torch.rand(6, dtype=torch.float64, requires_grad=True)
    state = [(torch.rand(6, dtype=torch.float64) + 0.5 + (key == "square_avg")).requires_grad_() for key in keys]
    options = {k: v for k, v in spec.typical.items() if k != "lr"}
    run = differentiable_step(spec.ours, {**options, "lr": 0.9}, keys)
    torch.autograd.gradcheck(run, (param, grad, *state))


@pytest.mark.parametrize("betas_spec", [s for s in SPECS if s.betas], ids=name)
def test_differentiable_hyper_parameters(betas_spec):
    """lr, betas and weight_decay given as tensors that require grad receive gradients."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    param = torch.rand(5, dtype=torch.float64, requires_grad=True).clone()
    param.grad = torch.rand(5, dtype=torch.float64)
    optimizer = betas_spec.ours([param], lr=lr, weight_decay=decay, differentiable=True)
    optimizer.state[param] = {
        "step": torch.tensor(3.0, dtype=torch.float64),
        "exp_avg": torch.rand(5, dtype=torch.float64),
        "exp_avg_sq": torch.rand(5, dtype=torch.float64),
    }
    optimizer.step()
    param.sum().backward()
    assert lr.grad is not None and lr.grad.item() != 0
    assert decay.grad is not None and decay.grad.item() != 0


@pytest.mark.only_for(lambda spec: spec.differentiable, reason="torch's class does not have the flag")
@pytest.mark.torchs
def test_differentiable_is_explained_and_equals_torch(spec):
    lockstep = Lockstep(spec, {**spec.typical, "differentiable": True}, dtype=torch.float64)
    report = optim_ext.explain(lockstep.ours)[0]
    assert not report.native and "differentiable" in report.reason and "differentiable" in str(report)
    for params in (lockstep.params, lockstep.twins):
        for param in params:
            param.requires_grad_(False)
    lockstep.step(3).check()
    give_grads(lockstep.params, 9)
    assert native_ops(lockstep.ours.step) == []


# Sparse gradients: native where torch takes them too.


def give_sparse(params, step):
    for i, param in enumerate(params):
        gen = torch.Generator().manual_seed(100 * step + i)
        rows = torch.randint(0, param.shape[0], (1, 4), generator=gen)
        values = torch.randn(4, *param.shape[1:], dtype=param.dtype, generator=gen)
        param.grad = torch.sparse_coo_tensor(rows, values, param.shape)


@pytest.mark.parametrize("sparse_spec", SPARSE, ids=name)
def test_sparse_gradients(sparse_spec):
    lockstep = Lockstep(sparse_spec, sparse_spec.sparse, make_params(((6, 3), (5,)), torch.float64))
    for step in range(5):
        for params in (lockstep.params, lockstep.twins):
            give_sparse(params, step)
        assert optim_ext.explain(lockstep.ours)[0].native
        for optimizer in lockstep.both:
            optimizer.step()
        lockstep.check()
    lockstep.step(2).check()  # dense again
    give_grads(lockstep.params, 50)
    assert optim_ext.explain(lockstep.ours)[0].native


@pytest.mark.parametrize("named", [False, True], ids=["by place", "by name"])
@pytest.mark.parametrize("sparse_spec", SPARSE, ids=name)
def test_sparse_gradients_refuse_weight_decay(sparse_spec, named):
    """As in torch, but before the dense parameters in front of it are written, whatever group they are in."""
    params = make_params([(6, 3)] * 4, torch.float64)
    own = [(f"layer.{i}", p) for i, p in enumerate(params)] if named else params
    options = {**sparse_spec.sparse, "weight_decay": 0.1}
    optimizer = sparse_spec.ours([{"params": own[:1]}, {"params": own[1:]}], **options)
    give_grads(params, 0)
    optimizer.step()
    give_grads(params, 1)
    give_sparse(params[2:3], 1)
    before = snapshot(optimizer)
    place = "parameter 'layer.2'" if named else "parameter 1 of group 1"
    with pytest.raises(RuntimeError, match=f"{place}: weight_decay option is not compatible with sparse gradients"):
        optimizer.step()
    assert snapshot(optimizer) == before
    optimizer.param_groups[1]["weight_decay"] = 0
    optimizer.step()


@pytest.mark.parametrize("sparse_spec", SPARSE, ids=name)
def test_sparse_and_dense_in_one_optimizer(sparse_spec):
    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:]}]

    lockstep = Lockstep(sparse_spec, sparse_spec.sparse, make_params([(6, 3)] * 4, torch.float64), groups=groups)
    for step in range(4):
        for params in (lockstep.params, lockstep.twins):
            give_grads(params, step)
            give_sparse(params[1:2], step)
        for optimizer in lockstep.both:
            optimizer.step()
        lockstep.check()


def test_embedding_trains_sparsely_and_densely_alike():
    """Uncoalesced gradients from a real layer."""
    finals = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = torch.nn.Embedding(7, 4, sparse=sparse).double()
        optimizer = optim_ext.Adagrad(table.parameters(), lr=0.1)
        for row in [*range(7)] * 3:
            optimizer.zero_grad()
            table(torch.tensor([1, row, 1])).square().sum().backward()
            optimizer.step()
        finals.append(table.weight.detach())
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dense_spec", [s for s in SPECS if s.sparse is None and s.in_torch], ids=name)
def test_sparse_gradients_are_torchs_error(dense_spec):
    messages = []
    for make in (dense_spec.torch, dense_spec.ours):
        params = make_params(((6, 3),))
        give_sparse(params, 0)
        optimizer = make(params)
        before = params[0].detach().clone()
        with pytest.raises(RuntimeError, match="does not support sparse gradients") as caught:
            optimizer.step()
        messages.append(str(caught.value))
        assert torch.equal(params[0], before)
    assert messages[0] == messages[1]


class Tagged(torch.Tensor):
    """A tensor subclass that sees every operation: kernels that read its memory would go past it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


NOT_NATIVE = {
    "sparse": (lambda p: p, lambda g: g.to_sparse(1)),
    "negative": (torch._neg_view, lambda g: g),
    "subclass": (lambda p: p.as_subclass(Tagged), lambda g: g),
}


@pytest.mark.parametrize("own_spec", [s for s in SPECS if not s.in_torch], ids=name)
@pytest.mark.parametrize("kind", NOT_NATIVE)
def test_what_torch_has_no_code_for_is_refused(own_spec, kind):
    parameter, gradient = NOT_NATIVE[kind]
    param = parameter(torch.ones(6, 3))
    param.grad = gradient(torch.ones(6, 3))
    before = param.detach().clone()
    optimizer = own_spec.ours([param])
    with pytest.raises(
        RuntimeError, match="runs natively only, and torch has no code for it: .*parameter 0 of group 0"
    ):
        optimizer.step()
    assert torch.equal(param, before) and not optimizer.state.get(param)


@pytest.mark.torchs
def test_tensor_subclass_takes_torchs_path(spec):
    param = torch.randn(4).as_subclass(Tagged)
    param.grad = torch.ones(4)
    optimizer = spec.ours([param], lr=0.1)
    report = optim_ext.explain(optimizer)[0]
    assert not report.native and report.reason
    assert native_ops(optimizer.step) == []


@pytest.mark.torchs
def test_groups_on_both_paths(spec):
    """One group takes torch's code and makes its state there, the other is native, from the first step on."""

    def groups(params):
        return [{"params": [params[0].detach().as_subclass(Tagged)]}, {"params": params[1:]}]

    lockstep = Lockstep(spec, dtype=torch.float64, groups=groups)
    for i in range(3):
        for optimizer in lockstep.both:
            give_grads([p for group in optimizer.param_groups for p in group["params"]], i)
            optimizer.step()
    lockstep.check()
