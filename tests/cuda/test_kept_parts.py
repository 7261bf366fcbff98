"""What one of several processes has of DTensors on a GPU that are kept in other ways than torch keeps them: the bits of the
CPU. The other processes are not there: torch's fake process group does nothing, and these steps communicate nothing.

With the argument "rule": of a rule written in Python, whose kernels are compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.usefixtures("one_cache_of_rules")
@pytest.mark.parametrize("of", ["built-in", "rule"])
def test_parts_have_the_bits_of_the_cpu(of):
    folders = [os.environ.get("PYTHONPATH"), *map(str, Path(__file__).parents[1:3])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    done = subprocess.run([sys.executable, __file__, of], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


def a_rule(params, **options):
    """Compiled on a GPU, interpreted on the CPU."""
    import optim_ext
    from optim_ext.math import sqrt

    @optim_ext.rule(("exp_avg", "exp_avg_sq"), backend="compiled" if params[0].is_cuda else "interpreted")
    def Written(param, grad, exp_avg, exp_avg_sq, *, step, lr=1e-2, beta=0.9, eps=1e-6):
        exp_avg = beta * exp_avg + (1 - beta) * grad
        exp_avg_sq = beta * exp_avg_sq + (1 - beta) * grad * grad
        return param - lr / (1 - beta**step) * exp_avg / (sqrt(exp_avg_sq) + eps), exp_avg, exp_avg_sq

    return Written(params, **options)


def main(of):
    import torch
    import torch.distributed as dist
    from on_double import ON_DOUBLE

    if ON_DOUBLE:
        import cuda_double  # noqa: F401
    from kept import TAKING, WAYS
    from lockstep import bits, copy_of, random
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from optim_ext import _sharding

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    layouts = [  # the whole, the dimension that is cut, and what this process has
        ((64, 100), 0, (16, 100)),
        ((33, 70), 0, (9, 70)),
        ((301,), 0, (76,)),
        ((16, 256), 1, (16, 64)),
        ((16, 4, 64), 1, (16, 1, 64)),
        ((3, 10), 1, (3, 3)),
        ((4, 3, 10), 2, (4, 3, 3)),
        ((5, 3), 0, (2, 3)),
    ]

    def trained(device, made, typical, way):
        mesh = init_device_mesh(device, (4,))

        def part(i, seed):
            shape, dim, own = layouts[i]
            stride = torch.empty(shape, device="meta").stride()
            local = random(own, torch.bfloat16, seed + i, device)
            return DTensor.from_local(
                local, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride
            )

        params = [nn.Parameter(part(i, 0)) for i in range(len(layouts))]
        optimizer = made(params, **copy_of(typical, device), **way, min_q8_size=256)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = part(i, 100 * (1 + step))
            optimizer.step()
        return [
            [
                bits(_sharding.local(p)),
                *((key, bits(_sharding.local(value))) for key, value in optimizer.state[p].items()),
            ]
            for p in params
        ]

    stepped = [(spec.name, spec.ours, spec.typical) for spec in TAKING if not spec.whole_tensors]
    for name, made, typical in stepped if of == "built-in" else [("rule", a_rule, {})]:
        for way in WAYS if name in ("AdamW", "rule") else WAYS[-1:]:
            on_gpu, on_cpu = (trained(device, made, typical, way) for device in ("cuda", "cpu"))
            for (shape, _, _), mine, other in zip(layouts, on_gpu, on_cpu, strict=True):
                assert mine == other, (name, way, shape)


if __name__ == "__main__":
    main(sys.argv[1])
