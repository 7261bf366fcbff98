"""pytorch_optimizer: wrappers around an optimizer, or around a class of one."""

import pytest
import torch
from beside import PACKAGES, Run, assert_native, assert_near, batches, both, four_ways, loss_of, network, values
from pytorch_optimizer import SAM, Lookahead, OrthoGrad

import optim_ext

WRAPPERS = {
    "Lookahead": lambda package, params: Lookahead(package.AdamW(params, lr=0.02), k=3),
    "OrthoGrad": lambda package, params: OrthoGrad(package.SGD(params, lr=0.1, momentum=0.9)),
    "SAM": lambda package, params: SAM(params, package.SGD, rho=0.05, lr=0.1, momentum=0.9),
    "SAM that clips": lambda package, params: SAM(params, package.AdamW, lr=0.02, **clip_of(package)),
}


def clip_of(package):
    """So high that it changes nothing, but it is there."""
    return {"max_norm": 1e6} if package is optim_ext else {}


def within(wrapper):
    return wrapper.base_optimizer if isinstance(wrapper, SAM) else wrapper.optimizer


def train(package, wrap, epochs=range(2), save_to=None, resume_from=None):
    model = network()
    optimizer = wrap(package, list(model.parameters()))
    if resume_from is not None:
        saved = torch.load(resume_from, weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    losses = []
    for _ in epochs:
        for batch in batches():

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            losses.append(closure().item())
            optimizer.step(*[closure] * isinstance(optimizer, SAM))
    if save_to is not None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, save_to)
    return Run(losses, values(model.parameters()), optimizer)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_losses_are_torchs(wrap):
    ours, theirs = both(train, wrap)
    assert theirs.losses[-1] < theirs.losses[0]
    assert_near([torch.tensor(ours.losses), *ours.params], [torch.tensor(theirs.losses), *theirs.params])
    assert_native(within(ours.optimizer))
    assert all(report.native for report in optim_ext.explain(ours.optimizer))


@four_ways
@pytest.mark.parametrize("wrap", [WRAPPERS["Lookahead"], WRAPPERS["SAM"]], ids=["Lookahead", "SAM"])
def test_checkpoints(wrap, writer, reader, tmp_path):
    file = tmp_path / "saved.pt"
    train(PACKAGES[writer], wrap, range(1), save_to=file)
    resumed = train(PACKAGES[reader], wrap, range(1), resume_from=file)
    assert_near(resumed.params, train(PACKAGES[reader], wrap).params)
