"""examples/lbfgs_pinn.py: its exact solution solves the equation, and a short run draws its picture."""

import math
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from programs import ROOT, run

sys.path.insert(0, str(ROOT / "examples"))

import lbfgs_pinn


def test_the_exact_solution_solves_the_equation():
    x, t = torch.meshgrid(torch.linspace(-0.95, 0.95, 39), torch.linspace(0.1, 1, 10), indexing="ij")
    x, t = x.double().requires_grad_(), t.double().requires_grad_()
    u = lbfgs_pinn.exact(x, t)
    u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x)
    assert (u_t + u * u_x - lbfgs_pinn.VISCOSITY * u_xx).abs().max() < 1e-6
    at_start = lbfgs_pinn.exact(x.detach(), torch.full_like(t, 1e-9).detach())
    torch.testing.assert_close(at_start, -torch.sin(math.pi * x.detach()), rtol=1e-6, atol=1e-6)


def test_a_short_run(tmp_path):
    picture = tmp_path / "burgers.png"
    done = run("examples/lbfgs_pinn.py", "--adam", 20, "--lbfgs", 2, "--output", picture)
    assert done.returncode == 1, done.stderr  # too short to be good
    assert "torch.optim.LBFGS" in done.stdout and "optim_ext.LBFGS" in done.stdout
    with Image.open(picture) as image:
        assert min(image.size) > 300
