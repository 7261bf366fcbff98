"""The collectives of a step on many processes, of which one is there: torch's fake process group does nothing."""

import os
import subprocess
import sys
from pathlib import Path


def test_collectives_of_512_processes():
    """As docs/distributed.md says: they depend on layouts, not on the number of processes or tensors."""
    folders = [os.environ.get("PYTHONPATH"), *map(str, Path(__file__).parents[1:3])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def main():
    import torch
    import torch.distributed as dist
    from device import DEVICE, put_test_tensors_there
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import optim_ext

    put_test_tensors_there()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=512)
    rows = [((512,), [Shard(0)], 1, 1), ((8, 64), [Replicate(), Shard(0)], 1, 2), ((8, 64), [Shard(0), Shard(1)], 2, 2)]
    for mesh_shape, places, cuts, dims in rows:
        mesh = init_device_mesh(DEVICE.type, mesh_shape)
        for count in (3, 30):
            shape = torch.Size([4 * 512 if mesh.ndim == 1 else 4 * 64, 8]) if cuts == 1 else torch.Size([32, 256])
            part = torch.Size([4, 8]) if cuts == 1 else torch.Size([4, 4])

            def made(part=part, mesh=mesh, places=places, shape=shape):
                stride = (shape[1], 1)
                return DTensor.from_local(torch.ones(part), mesh, places, run_check=False, shape=shape, stride=stride)

            params = [nn.Parameter(made()) for _ in range(count)]
            for name, of_step in (("AdamW", 0), ("Adafactor", 2), ("LAMB", cuts)):
                if cuts > 1 and name == "Adafactor":
                    continue  # it is gathered, for which the fake has nothing
                optimizer = getattr(optim_ext, name)(params)
                for policy in (False, True):
                    if policy:
                        optimizer.set_grad_policy(max_norm=1.0)
                    for first in (True, False):
                        for p in params:
                            p.grad = made()
                        with CommDebugMode() as communication:
                            optimizer.step()
                        agreement = dims if first and not policy else 0
                        expected = of_step + agreement + (cuts if policy else 0)
                        assert communication.get_total_counts() == expected, (mesh_shape, places, name, policy, first)


if __name__ == "__main__":
    main()
