"""A physics-informed network for the viscous Burgers equation, trained by Adam and then by L-BFGS, and compared with the
closed-form solution (Cole 1951, Hopf 1950).

    u_t + u u_x = nu u_xx   on -1 < x < 1, 0 < t < 1,   u(x, 0) = -sin(pi x),   u(-1, t) = u(1, t) = 0

    python examples/lbfgs_pinn.py                    # about a minute on two cores; writes burgers.png

The network is trained once by optim_ext.Adam; from there torch.optim.LBFGS and optim_ext.LBFGS go on, each with a copy of
it. Printed are the errors against the exact solution and the time of an iteration without that of the closure.
Exits with 1 if the solution is not as good as it should be.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from tqdm import tqdm

import optim_ext

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEED = 0
VISCOSITY = 0.02
POINTS = 1500  # where the equation is asked for
REQUIRED_ERROR = 0.01  # relative, in the mean square, after the default numbers of iterations


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The solution by Gauss-Hermite quadrature of the Cole-Hopf integrals, in double; ``x`` and ``t`` of one shape."""
    nodes, weights = hermite(100)
    shift = x.double()[..., None] - (4 * VISCOSITY * t.double()[..., None]).sqrt() * nodes
    # The largest exponent is taken out, which cancels in the quotient.
    exponent = -torch.cos(math.pi * shift) / (2 * math.pi * VISCOSITY)
    weighted = weights * torch.exp(exponent - exponent.amax(-1, keepdim=True))
    return -(torch.sin(math.pi * shift) * weighted).sum(-1) / weighted.sum(-1)


def hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Hermite quadrature, from the recurrence's matrix (Golub & Welsch 1969)."""
    off = (torch.arange(1, count, dtype=torch.float64) / 2).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, math.sqrt(math.pi) * vectors[0] ** 2


class Network(nn.Module):
    """Meets the initial and the boundary values by construction."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide, narrow in ((2, 32), (32, 32), (32, 32)):
            layers += [nn.Linear(wide, narrow), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(32, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        inner = self.layers(torch.stack([x, 2 * t - 1], -1)).squeeze(-1)
        return -torch.sin(math.pi * x) + t * (1 - x * x) * inner


def residual(network: Network, x: Tensor, t: Tensor) -> Tensor:
    """What is left of the equation at the points."""
    u = network(x, t)
    u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return u_t + u * u_x - VISCOSITY * u_xx


class Training:
    """A network with the points it is trained on, and the record of its losses."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network = network
        points = torch.quasirandom.SobolEngine(2, scramble=True, seed=SEED).draw(POINTS).to(device)
        self.x = (2 * points[:, 0] - 1).requires_grad_()
        self.t = points[:, 1].clone().requires_grad_()
        self.losses: list[float] = []
        self.own_seconds: list[float] = []  # the optimizer's, up to each of the losses
        self.begin = self.seconds_in_closure = 0.0

    def closure(self, optimizer: torch.optim.Optimizer) -> Tensor:
        begin = time.perf_counter()
        self.own_seconds.append(begin - self.begin - self.seconds_in_closure)
        optimizer.zero_grad()
        loss = residual(self.network, self.x, self.t).square().mean()
        loss.backward()
        self.losses.append(loss.item())
        self.seconds_in_closure += time.perf_counter() - begin
        return loss

    def run(self, optimizer: torch.optim.Optimizer, steps: int, title: str) -> float:
        """Take steps; returns the seconds they took outside of the closure."""
        self.seconds_in_closure = 0.0
        self.begin = time.perf_counter()
        for _ in tqdm(range(steps), desc=f"{title:16s}", unit="step", mininterval=0.5):
            optimizer.step(lambda: self.closure(optimizer))
        return time.perf_counter() - self.begin - self.seconds_in_closure

    def error(self) -> float:
        """The network's error relative to the exact solution, in the mean square over a grid."""
        x, t = grid(101, 51, self.x.device)
        with torch.no_grad():
            found = self.network(x, t).double()
        right = exact(x.cpu(), t.cpu()).to(found.device)
        return ((found - right).norm() / right.norm()).item()


def grid(nx: int, nt: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x, t = torch.linspace(-1, 1, nx, device=device), torch.linspace(0.01, 1, nt, device=device)
    return torch.meshgrid(x, t, indexing="ij")


def plot(trainings: dict[str, Training], adam_losses: list[float], path: Path) -> None:
    """The solution at four times beside the exact one, where it is wrong, and the losses of all optimizers: by calls of
    the closure, and of L-BFGS by time."""
    figure, ((solution, where), (losses, timed)) = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
    ours = trainings["optim_ext.LBFGS"]
    device = ours.x.device
    x = torch.linspace(-1, 1, 201, device=device)
    for index, moment in enumerate((0.05, 0.25, 0.5, 1.0)):
        t = torch.full_like(x, moment)
        with torch.no_grad():
            found = ours.network(x, t).cpu()
        solution.plot(x.cpu(), exact(x.cpu(), t.cpu()), color=f"C{index}", linewidth=3.5, alpha=0.5)
        solution.plot(x.cpu(), found, color=f"C{index}", linewidth=1, label=f"t = {moment}")
    solution.set_title("Solution: exact (wide) and network (thin)")
    solution.set_xlabel("x")
    solution.set_ylabel("u")
    solution.legend(fontsize="small", loc="upper right")
    xs, ts = grid(201, 101, device)
    with torch.no_grad():
        wrong = (ours.network(xs, ts).cpu().double() - exact(xs.cpu(), ts.cpu())).abs().clamp_min(1e-12)
    image = where.pcolormesh(ts.cpu(), xs.cpu(), wrong.log10(), shading="auto", vmin=-6, vmax=-1)
    figure.colorbar(image, ax=where, label="log10 of the error")
    where.set_title("Where the network is wrong")
    where.set_xlabel("t")
    where.set_ylabel("x")
    losses.plot(adam_losses, color="gray", linewidth=1, label="optim_ext.Adam")
    styles = {"torch.optim.LBFGS": ("tab:orange", 3, 0.6), "optim_ext.LBFGS": ("tab:blue", 1.2, 1)}
    for name, training in trainings.items():
        colour, width, alpha = styles[name]
        calls = range(len(adam_losses), len(adam_losses) + len(training.losses))
        losses.plot(calls, training.losses, color=colour, linewidth=width, alpha=alpha, label=name)
        timed.plot(training.own_seconds, training.losses, color=colour, linewidth=width, alpha=alpha, label=name)
    losses.set_title("Mean square of the equation's residual")
    losses.set_xlabel("calls of the closure")
    timed.set_title("The same over the time of L-BFGS itself")
    timed.set_xlabel("seconds outside of the closure")
    for panel in (losses, timed):
        panel.set_yscale("log")
        panel.legend(fontsize="small", loc="upper right")
    for panel in (solution, losses, timed):
        panel.grid(alpha=0.3)
    figure.suptitle(f"Viscous Burgers equation, nu = {VISCOSITY}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default), cuda, cuda:1")
    parser.add_argument("--adam", type=int, default=400, help="steps of Adam")
    parser.add_argument("--lbfgs", type=int, default=40, help="steps of L-BFGS, of 20 iterations each")
    parser.add_argument("--output", type=Path, default=Path("burgers.png"), help="where to save the picture")
    options = parser.parse_args(arguments)
    if min(options.adam, options.lbfgs) < 1:
        parser.error("--adam and --lbfgs must be at least 1")

    torch.manual_seed(SEED)
    training = Training(Network().to(options.device), options.device)
    training.run(optim_ext.Adam(training.network.parameters(), lr=5e-3), options.adam, "optim_ext.Adam")
    print(f"after {options.adam} steps of Adam: residual {training.losses[-1]:.2e}, error {training.error():.2e}")
    adam_losses = training.losses

    trainings, rows = {}, []
    for name, cls in (("torch.optim.LBFGS", torch.optim.LBFGS), ("optim_ext.LBFGS", optim_ext.LBFGS)):
        going_on = Training(copy.deepcopy(training.network), options.device)
        optimizer = cls(
            going_on.network.parameters(), history_size=100, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )
        seconds = going_on.run(optimizer, options.lbfgs, name)
        trainings[name] = going_on
        iterations = optimizer.state_dict()["state"][0]["n_iter"]
        rows.append(
            (name, iterations, len(going_on.losses), going_on.losses[-1], going_on.error(), seconds / iterations)
        )
    plot(trainings, adam_losses, options.output)

    print(f"\n{'':18s} {'iterations':>10s} {'evaluations':>11s} {'residual':>9s} {'error':>9s}   time of an iteration")
    for name, iterations, calls, loss, error, seconds in rows:
        print(f"{name:18s} {iterations:10d} {calls:11d} {loss:9.2e} {error:9.2e}   {seconds * 1e6:8.0f} us")
    print(f"\nTime: without the closure. Ratio: {rows[0][-1] / rows[1][-1]:.1f}. Picture: {options.output}")
    print(f"Required with the default numbers of steps: error at most {REQUIRED_ERROR}.")
    return 0 if rows[1][4] <= REQUIRED_ERROR else 1


if __name__ == "__main__":
    sys.exit(main())
