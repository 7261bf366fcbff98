"""GPyTorch's marginal likelihood, and BoTorch's fit, by Adam and L-BFGS in float64."""

import gpytorch
import pytest
import torch
from beside import Run, assert_alike, both, values
from botorch.fit import fit_gpytorch_mll_torch
from botorch.models import SingleTaskGP
from gpytorch.mlls import ExactMarginalLogLikelihood

POINTS = torch.linspace(0, 1, 24, dtype=torch.float64)
HEIGHTS = (POINTS * 6).sin() + 0.1 * torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Process(gpytorch.models.ExactGP):
    def __init__(self, likelihood):
        super().__init__(POINTS, HEIGHTS, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, points):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(points), self.covar_module(points))


def train(package, name, steps=10, **options):
    model = Process(gpytorch.likelihoods.GaussianLikelihood()).double()
    optimizer = getattr(package, name)(model.parameters(), **options)
    likelihood, losses = ExactMarginalLogLikelihood(model.likelihood, model), []

    def closure():
        optimizer.zero_grad()
        loss = -likelihood(model(POINTS), HEIGHTS)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return Run(losses, values(model.parameters()), optimizer)


@pytest.mark.parametrize(
    "name, options",
    [("Adam", {"lr": 0.1}), ("LBFGS", {"lr": 0.1}), ("LBFGS", {"line_search_fn": "strong_wolfe", "max_iter": 8})],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_fits_of_gpytorch(name, options):
    """As many evaluations as with torch's class, also in the line search."""
    assert_alike(*both(train, name, **options))


def fit(package):
    model = SingleTaskGP(POINTS.view(-1, 1), HEIGHTS.view(-1, 1))
    likelihood, optimizers, losses = ExactMarginalLogLikelihood(model.likelihood, model), [], []

    def make(params):
        optimizers.append(package.Adam(params, lr=0.01))
        return optimizers[-1]

    fit_gpytorch_mll_torch(
        likelihood, optimizer=make, step_limit=25, callback=lambda params, result: losses.append(float(result.fval))
    )
    return Run(losses, values(model.parameters()), optimizers[0])


def test_fits_of_botorch():
    assert_alike(*both(fit))
