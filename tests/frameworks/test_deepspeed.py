"""DeepSpeed's engine and its ZeRO around these optimizers, in processes of their own, as it takes a process over."""

import json
import os
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import deepspeed  # noqa: F401  (so that a missing one is seen here)
import pytest
import torch
from beside import NEAR, NEAR_IN_HALF, PACKAGES, WAYS, assert_near

PROGRAM = Path(__file__).parent / "deepspeed_program.py"


def zero(stage, **options):
    return {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}, **options}


UNTESTED = {"zero_allow_untested_optimizer": True}
CONFIGS = {
    "float32": ({}, NEAR),
    "clipping": ({"gradient_clipping": 0.5}, NEAR),
    "accumulation": ({"gradient_accumulation_steps": 2}, NEAR),
    "ZeRO 1 in bfloat16": (zero(1, **UNTESTED), NEAR_IN_HALF),
    "ZeRO 2 in bfloat16": (zero(2, **UNTESTED), NEAR_IN_HALF),
}


def job(package, config, steps=(0, 12), **others):
    return {"package": package, "config": config, "steps": steps, **others}


def run(folder, jobs, world=1):
    """The results of the jobs, in one process or in several that work together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    output = folder / "results.pt"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(rank), str(world), port, output, json.dumps(jobs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=folder,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)
    return torch.load(output)


def assert_alike(ours, theirs, tolerance):
    assert ours["module"].startswith("optim_ext.") and theirs["module"].startswith("torch.optim.")
    assert min(theirs["losses"]) < theirs["losses"][0]
    mine, other = (torch.tensor(each["losses"]) for each in (ours, theirs))
    assert_near([mine, *ours["params"]], [other, *theirs["params"]], tolerance)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process by package and configuration."""
    jobs = {(package, name): job(package, CONFIGS[name][0]) for package, name in product(PACKAGES, CONFIGS)}
    return dict(zip(jobs, run(tmp_path_factory.mktemp("alone"), list(jobs.values())), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_torchs(name, alone):
    assert_alike(alone["ours", name], alone["torch", name], CONFIGS[name][1])


def test_zero_on_two_processes(tmp_path):
    theirs, ours = run(tmp_path, [job(package, zero(2, **UNTESTED)) for package in PACKAGES], world=2)
    assert_alike(ours, theirs, NEAR_IN_HALF)


def test_the_constructors_norm_and_what_zero_does_not_take(tmp_path, alone):
    """ZeRO takes exact types that it knows unless told otherwise, and steps group by group, where no norm is of all."""
    clipping, told = {"options": {"max_norm": 0.5}}, zero(1, **UNTESTED)
    clipped, refused, of_torch, grouped, of_all = run(
        tmp_path,
        [
            job("ours", {}, **clipping),
            job("ours", zero(1)),
            job("torch", zero(1)),
            job("ours", told, groups=2),
            job("ours", told, groups=2, **clipping),
        ],
    )
    assert_alike(clipped, alone["torch", "clipping"], NEAR)
    assert "zero_allow_untested_optimizer" in refused["error"] and "losses" in of_torch
    assert "losses" in grouped and "group by group" in of_all["error"]


def test_checkpoints_four_ways(tmp_path):
    config = zero(1, **UNTESTED)
    jobs = [job(package, config) for package in PACKAGES]
    jobs += [job(package, config, (0, 6), save_to=str(tmp_path / package)) for package in PACKAGES]
    jobs += [job(reader, config, (6, 12), resume_from=str(tmp_path / writer)) for writer, reader in WAYS]
    results = run(tmp_path, jobs)
    straight = dict(zip(PACKAGES, results, strict=False))
    for (writer, reader), resumed in zip(WAYS, results[2 * len(PACKAGES) :], strict=True):
        assert len(resumed["losses"]) == 6
        assert_near(resumed["params"], straight[reader]["params"], NEAR_IN_HALF)
        if writer == reader:
            assert resumed["losses"] == straight[reader]["losses"][6:]
            assert all(map(torch.equal, resumed["params"], straight[reader]["params"]))
