"""Pyro: a class and a dict of keywords, of which it makes one optimizer for each parameter."""

import pyro
import pyro.distributions as dist
import torch
from beside import PACKAGES, assert_native, assert_near, four_ways, values
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import PyroOptim

import optim_ext

DATA = torch.randn(40, generator=torch.Generator().manual_seed(9)) * 0.5 + 2


def model(data):
    centre = pyro.sample("centre", dist.Normal(0.0, 5.0))
    width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("seen", dist.Normal(centre, width), obs=data)


def infer(package, steps=30, clip=None, save_to=None, resume_from=None, **options):
    """Losses, parameters and Pyro's optimizer."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0 if resume_from is None else 1)
    optimizer = PyroOptim(package.Adam, {"lr": 0.05, **options}, clip_args=clip)
    svi = SVI(model, AutoNormal(model), optimizer, Trace_ELBO())
    if resume_from is not None:
        pyro.get_param_store().load(str(resume_from / "params"))
        optimizer.load(str(resume_from / "optimizer"))
    losses = [svi.step(DATA) for _ in range(steps)]
    if save_to is not None:
        pyro.get_param_store().save(str(save_to / "params"))
        optimizer.save(str(save_to / "optimizer"))
    store = pyro.get_param_store()
    return torch.tensor(losses), values(store[name] for name in sorted(store.keys())), optimizer


def assert_alike(ours, theirs):
    assert_near([ours[0], *ours[1]], [theirs[0], *theirs[1]])
    for made in ours[2].optim_objs.values():
        assert_native(made)


def test_losses_are_torchs():
    ours, theirs = infer(optim_ext), infer(torch.optim)
    assert theirs[0][-5:].mean() < theirs[0][:5].mean()
    assert_alike(ours, theirs)


def test_the_constructors_norm_is_of_one_parameter():
    """As Pyro's own clip is."""
    ours = infer(optim_ext, max_norm=0.5)
    assert_alike(ours, infer(torch.optim, clip={"clip_norm": 0.5}))
    assert len(ours[2].optim_objs) > 1
    assert all(len(made.param_groups[0]["params"]) == 1 for made in ours[2].optim_objs.values())


@four_ways
def test_checkpoints(writer, reader, tmp_path):
    infer(PACKAGES[writer], steps=10, save_to=tmp_path)
    resumed = infer(PACKAGES[reader], steps=10, resume_from=tmp_path)
    assert_near(resumed[1], infer(torch.optim, steps=10, resume_from=tmp_path)[1])
