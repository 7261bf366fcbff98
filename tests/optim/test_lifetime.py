"""Many steps, several threads, a fork: nothing grows, races or hangs."""

import gc
import os
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
from lockstep import give_grads, make_params, twin
from specs import SPECS

SHAPES = ((8, 8), (8,), ())


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("replan", [False, True], ids=["steady", "changing gradients"])
def test_memory_does_not_grow(spec, replan):
    """10,000 steps; with `replan` the state is replaced and parameters freeze and thaw as they go."""
    params = make_params(SHAPES)
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    grads = [p.grad for p in params]

    def steps(count):
        for i in range(count):
            if replan:
                params[i % 3].grad = None if i % 2 else grads[i % 3]
                if i % 5 == 0:
                    for entries in optimizer.state.values():
                        entries.update({key: value.clone() for key, value in entries.items()})
            optimizer.step()
        gc.collect()

    steps(2000)
    objects, resident = len(gc.get_objects()), resident_bytes()
    steps(10_000)
    assert len(gc.get_objects()) - objects < 100
    assert resident_bytes() - resident < 2 << 20  # 10,000 leaks of 200 bytes


def test_making_and_dropping_optimizers_does_not_grow(spec):
    def cycle(count):
        for _ in range(count):
            params = make_params(((64, 64), (64,)))
            optimizer = spec.ours(params, **spec.typical)
            give_grads(params, 0)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
        del params, optimizer
        gc.collect()

    cycle(30)
    objects, resident = len(gc.get_objects()), resident_bytes()
    cycle(100)  # of some 50 KB each
    assert len(gc.get_objects()) - objects < 100
    assert resident_bytes() - resident < 2 << 20


def test_no_memory_for_a_step(spec):
    """A step in steady state allocates no tensor."""
    params = make_params(((256, 256), (1000,)))
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    for _ in range(2):
        optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    largest = max((abs(event.cpu_memory_usage) for event in profile.events()), default=0)
    assert largest < 4096


def test_failed_steps_do_not_grow(spec):
    params = make_params(SHAPES)
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = float("nan")

    def steps(count):
        for _ in range(count):
            with pytest.raises(ValueError, match="NaN"):
                optimizer.step()
        gc.collect()

    steps(200)
    objects, resident = len(gc.get_objects()), resident_bytes()
    steps(2000)
    assert len(gc.get_objects()) - objects < 100
    assert resident_bytes() - resident < 2 << 20


def test_two_optimizers_in_two_threads(spec):
    """Each gets what it gets alone."""
    shapes = ((200, 100), (5,), (3000,))
    runs = [make_params(shapes, seed=10 * i) for i in range(2)]
    alone = [twin(params) for params in runs]
    grads = [[torch.randn(shape) for shape in shapes] for _ in runs]

    def train(params, own_grads):
        optimizer = spec.ours(params, **spec.typical)
        for i in range(60):
            for param, grad in zip(params, own_grads, strict=True):
                param.grad = None if i % 7 == 3 and grad.dim() == 2 else grad * (1 + i)
            optimizer.step()

    for params, own in zip(alone, grads, strict=True):
        train(params, own)
    failures = []

    def guarded(*args):
        try:
            train(*args)
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=guarded, args=pair) for pair in zip(runs, grads, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for params, expected in zip(runs, alone, strict=True):
        assert all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))


def test_one_optimizer_from_two_threads_in_turn(spec):
    """Made and stepped in one thread, stepped on in another."""
    params = make_params(SHAPES)
    others = twin(params)
    optimizer, reference = spec.ours(params, **spec.typical), spec.ours(others, **spec.typical)
    for step in range(4):
        give_grads(params, step)
        give_grads(others, step)
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_step_releases_the_interpreter():
    """Another Python thread runs while a large step does."""
    spec = next(spec for spec in SPECS if spec.name == "AdamW")
    params = [torch.nn.Parameter(torch.zeros(1 << 24))]
    optimizer = spec.ours(params)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(len(ticks))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # only a release lets the other thread in
    thread = threading.Thread(target=tick)
    try:
        thread.start()
        started = len(ticks)
        optimizer.step()
        ran_meanwhile = len(ticks) - started
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
        torch.set_num_threads(before)
    assert ran_meanwhile > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_fork(spec):
    """A child steps on after its parent has used threads, with the same result, and does not hang."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        params = make_params(((400, 500), (5,)))
        optimizer = spec.ours(params, **spec.typical)
        give_grads(params, 0)
        optimizer.step()
        give_grads(params, 1)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                optimizer.step()
                total = torch.stack([p.detach().view(torch.int32).long().sum() for p in params]).tolist()
                os.write(writing, repr(total).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        watchdog = threading.Timer(60, os.kill, (child, 9))
        watchdog.start()
        _, status = os.waitpid(child, 0)
        watchdog.cancel()
        assert status == 0
        found = os.read(reading, 1000).decode()
        optimizer.step()
        assert found == repr([p.detach().view(torch.int32).long().sum().item() for p in params])
    finally:
        torch.set_num_threads(before)
