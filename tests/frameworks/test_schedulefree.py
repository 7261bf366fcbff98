"""schedulefree's wrapper, which swaps parameters and averages in place around the step of what it wraps."""

import pytest
import torch
from beside import PACKAGES, Run, assert_alike, assert_resumed, batches, both, four_ways, loss_of, network, values
from schedulefree import ScheduleFreeWrapper

import optim_ext


def train(package, epochs=range(3), save_to=None, resume_from=None, **options):
    model = network()
    base = package.SGD(model.parameters(), lr=0.5, **options)
    optimizer = ScheduleFreeWrapper(base, momentum=0.9, weight_decay_at_y=0.01)
    if resume_from is not None:
        saved = torch.load(resume_from)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.train_mode = True
    optimizer.train()
    losses = []
    for _ in epochs:
        for batch in batches():
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    if save_to is not None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, save_to)
    else:
        optimizer.eval()
    return Run(losses, values(model.parameters()), base)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"weight_decay": 0.01}], ids=str)
def test_losses_are_torchs(options):
    """Of SGD alone: the wrapper keeps its average in the state of what it wraps before the first step, and classes of torch
    that have to make state then make none."""
    assert_alike(*both(train, **options))


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES.keys())
def test_classes_with_state_of_their_own_are_refused(package):
    """With torch's error."""
    params = list(network().parameters())
    optimizer = ScheduleFreeWrapper(package.AdamW(params))
    optimizer.train()
    loss_of(lambda points: points @ params[0].T, batches()[0]).backward()
    with pytest.raises(KeyError, match="exp_avg"):
        optimizer.step()


def test_clipping_by_the_constructor():
    """The wrapper's average lies in the state of the optimizer that it wraps, and that is looked at."""
    clipped, plain = train(optim_ext, max_norm=0.1), train(optim_ext)
    assert not torch.equal(clipped.params[0], plain.params[0])
    assert any("z" in entry for entry in clipped.optimizer.state.values())


@four_ways
def test_checkpoints(writer, reader, tmp_path):
    file = tmp_path / "saved.pt"
    train(PACKAGES[writer], epochs=range(1), save_to=file)
    resumed = train(PACKAGES[reader], epochs=range(2), resume_from=file)
    assert_resumed(resumed, train(PACKAGES[reader]), writer == reader)


def test_explain_looks_into_it():
    wrapper = ScheduleFreeWrapper(optim_ext.SGD(network().parameters(), lr=0.1))
    reports = optim_ext.explain(wrapper)
    assert reports and all(report.native for report in reports)
