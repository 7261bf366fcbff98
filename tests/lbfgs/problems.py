"""Functions to minimise, each with a start, and two optimizers run on them side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from on_double import length
from torch import Tensor


def rosenbrock(x: Tensor) -> Tensor:
    """Rosenbrock 1960, chained. Its minimum is 0."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def beale(x: Tensor) -> Tensor:
    return (
        (1.5 - x[0] + x[0] * x[1]) ** 2 + (2.25 - x[0] + x[0] * x[1] ** 2) ** 2 + (2.625 - x[0] + x[0] * x[1] ** 3) ** 2
    )


def booth(x: Tensor) -> Tensor:
    return (x[0] + 2 * x[1] - 7) ** 2 + (2 * x[0] + x[1] - 5) ** 2


def himmelblau(x: Tensor) -> Tensor:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def logistic() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Regression on scikit-learn's breast-cancer data, with a little L2: weights and an intercept."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    features = torch.tensor(data.data)
    features = (features - features.mean(0)) / features.std(0)
    signs = torch.tensor(data.target, dtype=torch.float64) * 2 - 1

    def loss(w: Tensor) -> Tensor:
        margin = signs.to(w.dtype) * (features.to(w.dtype) @ w[:-1] + w[-1])
        return torch.nn.functional.softplus(-margin).mean() + 1e-4 * (w[:-1] ** 2).sum()

    return loss, torch.zeros(features.shape[1] + 1, dtype=torch.float64)


def quartic(seed: int, n: int = 20) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A convex quadratic plus fourth powers. Its minimum is some number, at which losses in single precision stall."""
    generator = torch.Generator().manual_seed(seed)
    root, linear, start = (torch.randn(size, generator=generator).double() for size in ((n, n), (n,), (n,)))
    matrix = root @ root.T / n + 0.1 * torch.eye(n)

    def loss(x: Tensor) -> Tensor:
        return 0.5 * x @ (matrix.to(x.dtype) @ x) - linear.to(x.dtype) @ x + 0.1 * (x**4).sum()

    return loss, start


def classification(seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Logistic regression on noisy labels, with a little L2."""
    generator = torch.Generator().manual_seed(seed)
    features, true, noise = (torch.randn(size, generator=generator).double() for size in ((300, 30), (30,), (300,)))
    signs = torch.sign(features @ true + noise)

    def loss(w: Tensor) -> Tensor:
        margin = signs.to(w.dtype) * (features.to(w.dtype) @ w)
        return torch.nn.functional.softplus(-margin).mean() + 1e-3 * (w**2).sum()

    return loss, torch.zeros(30, dtype=torch.float64)


def regression(seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A network of two hidden layers of 16, whose weights are one vector."""
    generator = torch.Generator().manual_seed(seed)
    given, true = (torch.randn(size, generator=generator).double() for size in ((200, 5), (5, 1)))
    shapes = [(5, 16), (16,), (16, 16), (16,), (16, 1), (1,)]
    sizes = [math.prod(shape) for shape in shapes]
    start = torch.cat([torch.rand(size, generator=generator).double() - 0.5 for size in sizes])

    def loss(x: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(x.split(sizes), shapes, strict=True)]
        inner = given.to(x.dtype)
        for weight, bias in zip(parts[:-2:2], parts[1:-2:2], strict=True):
            inner = torch.tanh(inner @ weight + bias)
        return (inner @ parts[-2] + parts[-1] - torch.sin(given @ true).to(x.dtype)).square().mean()

    return loss, start


def random_start(loss: Callable[[Tensor], Tensor], n: int, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    return loss, torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rosenbrock_start(n: int) -> Tensor:
    return torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat((n + 1) // 2)[:n].clone()


PROBLEMS: dict[str, Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]]] = {
    **{f"rosenbrock-{n}": (lambda n=n: (rosenbrock, rosenbrock_start(n))) for n in (2, 10, 100, length(10_000))},
    "beale": lambda: (beale, torch.tensor([1.0, 1.0], dtype=torch.float64)),
    "booth": lambda: (booth, torch.tensor([-4.0, 9.0], dtype=torch.float64)),
    "himmelblau": lambda: (himmelblau, torch.tensor([0.0, 0.0], dtype=torch.float64)),
    "logistic": logistic,
}


@dataclass
class Run:
    """An optimizer at work on one problem; `losses` are those of all calls of the closure."""

    optimizer: torch.optim.LBFGS
    params: list[Tensor]
    loss: Callable[[list[Tensor]], Tensor]

    def __post_init__(self) -> None:
        self.losses: list[float] = []

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.params)
        loss.backward()
        self.losses.append(loss.item())
        return loss

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.optimizer.step(self.closure)
        return self

    @property
    def state(self) -> dict:
        return self.optimizer.state[self.params[0]]

    @property
    def calls(self) -> int:
        return len(self.losses)


def start(cls, problem: str, dtype=torch.float64, **options) -> Run:
    return start_at(cls, *PROBLEMS[problem](), dtype, **options)


def start_at(cls, loss: Callable[[Tensor], Tensor], at: Tensor, dtype=torch.float64, **options) -> Run:
    param = torch.nn.Parameter(at.to(dtype, copy=True))
    return Run(cls([param], **options), [param], lambda params: loss(params[0]))
