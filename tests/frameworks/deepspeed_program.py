"""Trains under DeepSpeed, as one of several processes: ``deepspeed_program.py RANK WORLD PORT OUTPUT JOBS``.

JOBS is a JSON list of trainings, one after the other: who makes the optimizer, DeepSpeed's configuration, which steps, and
checkpoints to write or to go on from. What came out of each goes to OUTPUT: losses and parameters, or the error.
"""

import json
import os
import sys

rank, world, port, output, jobs = sys.argv[1:]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}

import deepspeed  # noqa: E402  (the environment is read here)
import deepspeed.comm.torch  # noqa: E402
import torch  # noqa: E402
from beside import PACKAGES, batches, loss_of, network, values  # noqa: E402

# DeepSpeed compiles something for processes of one machine, which it can do without.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
torch.set_num_threads(1)


def train(package, config, steps, groups=1, options=None, save_to=None, resume_from=None):
    model = network()
    params = list(model.parameters())
    grouped = [{"params": params[group::groups]} for group in range(groups)]
    made = PACKAGES[package].AdamW(grouped, lr=0.02, **options or {})
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=made, config={"train_micro_batch_size_per_gpu": 16, **config}
    )
    if resume_from is not None:
        engine.load_checkpoint(resume_from, tag="saved")
    dtype, losses = next(model.parameters()).dtype, []
    for step in range(*steps):
        points, classes = batches()[step % 6]
        loss = loss_of(lambda given: engine(given).float(), (points.to(dtype), classes))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if save_to is not None:
        engine.save_checkpoint(save_to, tag="saved")
    return {"losses": losses, "params": values(model.parameters()), "module": type(made).__module__}


results = []
for job in json.loads(jobs):
    try:
        results.append(train(**job))
    except (AssertionError, RuntimeError) as error:  # what it, or an optimizer, has to say of a configuration
        results.append({"error": str(error)})
if rank == "0":
    torch.save(results, output)
