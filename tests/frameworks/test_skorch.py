"""skorch: an optimizer is a class and `optimizer__...` keywords of an estimator."""

import pickle

import numpy as np
import pytest
import torch
from beside import PACKAGES, Run, assert_alike, assert_resumed, both, four_ways, network, samples, values
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping, LRScheduler
from torch import nn

import optim_ext

POINTS, CLASSES = (tensor.numpy() for tensor in samples())


class Network(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layers = network().to(dtype)

    def forward(self, points):
        return self.layers(points)


def estimator(package, name="AdamW", callbacks=(), epochs=4, **options):
    return NeuralNetClassifier(
        Network,
        criterion=nn.CrossEntropyLoss,
        optimizer=getattr(package, name),
        lr=options.pop("lr", 0.02),
        max_epochs=epochs,
        batch_size=16,
        iterator_train__shuffle=False,
        train_split=None,
        callbacks=list(callbacks),
        verbose=0,
        **{f"optimizer__{key}": value for key, value in options.items()},
    )


def result(net):
    return Run(net.history[:, "train_loss"], values(net.module_.parameters()), net.optimizer_)


def train(package, *args, **options):
    return result(estimator(package, *args, **options).fit(POINTS, CLASSES))


@pytest.mark.parametrize(
    "name, options",
    [
        ("AdamW", {"weight_decay": 0.1}),
        ("SGD", {"lr": 0.05, "momentum": 0.9}),
        ("AdamW", {"param_groups": [("layers.0.*", {"lr": 0.001})]}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_losses_are_torchs(name, options):
    assert_alike(*both(train, name, **options))


def test_lbfgs():
    """skorch steps every optimizer by a closure. In double, as small differences grow from iteration to iteration."""

    def train(package):
        net = estimator(package, "LBFGS", lr=0.1, max_iter=4, history_size=5).set_params(module__dtype=torch.float64)
        return result(net.fit(POINTS.astype(np.float64), CLASSES))

    assert_alike(*both(train))


def test_callbacks():
    for callback in (GradientNormClipping(0.5), LRScheduler("StepLR", step_size=2, gamma=0.5)):
        assert_alike(*both(train, callbacks=[callback]))


def test_the_constructors_norm_is_the_callbacks_clip():
    ours = train(optim_ext, max_norm=0.5)
    assert_alike(ours, train(torch.optim, callbacks=[GradientNormClipping(0.5)]))
    assert ours.optimizer.grad_policy.max_norm == 0.5


@four_ways
def test_checkpoints(writer, reader, tmp_path):
    files = {"f_params": tmp_path / "params.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    estimator(PACKAGES[writer], epochs=2).fit(POINTS, CLASSES).save_params(**files)
    net = estimator(PACKAGES[reader]).initialize()
    net.load_params(**files)
    net.fit_loop(POINTS, CLASSES, epochs=2)
    resumed = result(net)
    assert_resumed(resumed, train(PACKAGES[reader]), writer == reader)


def test_estimators_are_cloned_pickled_and_searched():
    net = estimator(optim_ext, max_norm=0.5).fit(POINTS, CLASSES)
    again = pickle.loads(pickle.dumps(net))
    assert type(again.optimizer_) is optim_ext.AdamW and again.optimizer_.grad_policy.max_norm == 0.5
    for one in (net, again):
        one.partial_fit(POINTS, CLASSES)
    assert all(torch.equal(p, q) for p, q in zip(net.module_.parameters(), again.module_.parameters(), strict=True))
    assert clone(net).optimizer is optim_ext.AdamW
    search = GridSearchCV(estimator(optim_ext), {"optimizer__weight_decay": [0.0, 0.5]}, cv=2, scoring="accuracy")
    assert np.isfinite(search.fit(POINTS, CLASSES).best_score_)
