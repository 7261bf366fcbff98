"""patch_torch: calling torch's classes makes ours, and nothing else changes. In processes of their own, as other tests in
this one have made optimizers of torch."""

import pytest

PRELUDE = """
import copy, io, pickle, sys
import torch
from torch.optim import AdamW as taken_before
import optim_ext
def params():
    return [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
"""


@pytest.fixture(scope="module")
def check(python_with_torch):
    """Run code that asserts."""
    return lambda code: python_with_torch(PRELUDE + code)


def test_every_native_class_by_name(check):
    check("""
from optim_ext._patch import replacements
native = replacements()
assert {cls.__name__ for cls in native} == {
    "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "Muon", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SGD", "SparseAdam"}
patch = optim_ext.patch_torch()
for theirs, ours in native.items():
    some = params()[1:] if theirs.__name__ == "Muon" else params()
    made = getattr(torch.optim, theirs.__name__)(some, lr=0.1)
    assert type(made) is ours and isinstance(made, theirs) and made.defaults["lr"] == 0.1
    assert all(report.native for report in optim_ext.explain(made))
    assert type(ours(some)) is ours
assert type(taken_before(params(), max_norm=1.0)) is optim_ext.AdamW
assert taken_before(params(), max_norm=1.0).grad_policy.max_norm == 1.0
patch.undo()
for theirs in native:
    assert type(theirs(params()[1:] if theirs.__name__ == "Muon" else params())) is theirs
patch.undo()
""")


def test_what_it_makes_steps_as_ours(check):
    """Checkpoints, copies and schedulers included."""
    check("""
def train(optimizer, own, steps=3):
    for step in range(steps):
        for p in own:
            p.grad = torch.full_like(p, 0.5 + step)
        optimizer.step()
ours, theirs = params(), params()
with optim_ext.patch_torch() as patch:
    made = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(made, 2)
    train(made, theirs)
    scheduler.step()
    other = torch.optim.SGD(params(), lr=0.5)
    other.load_state_dict(made.state_dict())
    assert type(copy.deepcopy(made)) is type(pickle.loads(pickle.dumps(made))) is optim_ext.SGD
    lbfgs_param = params()[:1]
    lbfgs = torch.optim.LBFGS(lbfgs_param)
    def closure():
        lbfgs.zero_grad()
        loss = lbfgs_param[0].square().sum()
        loss.backward()
        return loss
    lbfgs.step(closure)
    tied = [lbfgs_param[0], torch.nn.Parameter(lbfgs_param[0].data)]  # takes torch's own code
    torch.optim.LBFGS(tied).step(closure)
native = optim_ext.SGD(ours, lr=0.1, momentum=0.9)
train(native, ours)
assert all(torch.equal(p, q) for p, q in zip(ours, theirs))
assert type(made) is optim_ext.SGD
""")


def test_classes_derived_from_torchs_keep_its_step(check):
    check("""
class Own(torch.optim.Adam):
    pass
class Plain(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})
class Noted:
    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls)
        made.noted = args[1:], kwargs
        return made
class Mixed(torch.optim.SGD, Noted):
    pass
with optim_ext.patch_torch():
    class Later(torch.optim.AdamW):
        def __init__(self, params, rate):
            super().__init__(params, lr=rate)
    for cls, given in ((Own, {}), (Plain, {}), (Later, {"rate": 0.5}), (Mixed, {"lr": 0.5})):
        made = cls(params(), **given)
        assert type(made) is cls and not isinstance(made, optim_ext._native_step.NativeStep)
    assert Mixed(params(), 0.25, momentum=0.5).noted == ((0.25,), {"momentum": 0.5})
    class Ours(optim_ext.AdamW):
        pass
    assert type(Ours(params())) is Ours
    assert issubclass(Own, torch.optim.Adam) and isinstance(torch.optim.AdamW(params()), torch.optim.Adam)
    assert torch.optim.AdamW is taken_before
    try:
        torch.optim.AdamW(params(), no_such=1)
    except TypeError as error:
        assert "AdamW() got an unexpected keyword argument 'no_such'" in str(error)
    else:
        raise AssertionError
""")


def test_existing_optimizers_are_refused_and_stay_what_they_are(check):
    check("""
kept = [torch.optim.AdamW(params()), torch.optim.SGD(params()), torch.optim.SGD(params())]
try:
    optim_ext.patch_torch()
except RuntimeError as error:
    assert "exist already (1 AdamW, 2 SGD)" in str(error) and "allow_existing=True" in str(error), error
else:
    raise AssertionError
assert type(torch.optim.AdamW(params())) is torch.optim.AdamW
saved = pickle.dumps(kept[0])
with optim_ext.patch_torch(allow_existing=True):
    assert [type(each) for each in kept] == [torch.optim.AdamW, torch.optim.SGD, torch.optim.SGD]
    assert type(copy.deepcopy(kept[0])) is type(pickle.loads(saved)) is torch.optim.AdamW
    assert isinstance(kept[0], torch.optim.AdamW)
    assert type(torch.optim.AdamW(params())) is optim_ext.AdamW
del kept
class Own(torch.optim.Adam):
    pass
own, native = Own(params()), optim_ext.SGD(params())  # neither would be another
optim_ext.patch_torch().undo()
""")


def test_patches_nest_and_end_with_an_exception(check):
    check("""
outer = optim_ext.patch_torch()
try:
    with optim_ext.patch_torch():
        raise KeyError
except KeyError:
    pass
assert type(torch.optim.SGD(params())) is optim_ext.SGD
inner = optim_ext.patch_torch()
outer.undo()
outer.undo()
assert type(torch.optim.SGD(params())) is optim_ext.SGD
inner.undo()
assert type(torch.optim.SGD(params())) is torch.optim.SGD
""")


def test_zero_redundancy_optimizer_and_averages(check):
    """Who is given torch's class makes ours; swa_utils stays torch's."""
    check("""
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with optim_ext.patch_torch():
    zero = ZeroRedundancyOptimizer(params(), optimizer_class=torch.optim.AdamW, lr=0.1)
    assert type(zero.optim) is optim_ext.AdamW
    assert type(torch.optim.swa_utils.AveragedModel(torch.nn.Linear(1, 1))) is torch.optim.swa_utils.AveragedModel
dist.destroy_process_group()
""")
