"""Many steps, several threads, a fork: nothing grows, races or hangs."""

import ctypes
import gc
import os
import sys
import threading
import traceback
from itertools import cycle, islice

import pytest
import torch
from lockstep import assert_close, give_grads, make_params, twin
from on_double import repetitions
from specs import SPECS, Tolerance

from optim_ext import _C
from optim_ext._grad_control import StepControls

SHAPES = ((8, 8), (8,), ())


class Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


class Memory:
    """What is in use, by Python's own allocator and by malloc. Counted, not measured: resident pages come and go with
    the allocators' pools."""

    def __init__(self):
        gc.collect()
        self.python = sys.getallocatedblocks()
        mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc 2.33
        self.native = 0
        if mallinfo2 is not None:
            mallinfo2.restype = Mallinfo2
            info = mallinfo2()
            self.native = info.uordblks + info.hblkhd

    def assert_same(self):
        """A few objects may differ (caches, the clock of pytest), not one per step."""
        now = Memory()
        assert now.python - self.python < 500
        assert now.native - self.native < 32 << 10


class Training:
    """An optimizer, and what may happen to it between two steps."""

    def __init__(self, spec):
        self.params = make_params(SHAPES)
        self.optimizer = spec.ours(self.params, **spec.typical)
        give_grads(self.params, 0)
        self.grads = [p.grad for p in self.params]
        self.frozen = cycle(self.params)

    def nothing(self):
        """The next step finds what the last one left."""

    def freeze_one(self):
        next(self.frozen).grad = None

    def thaw(self):
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def replace_state(self):
        for entries in self.optimizer.state.values():
            entries.update({key: value.clone() for key, value in entries.items()})


BETWEEN_STEPS = {
    "steady": [Training.nothing],
    "changing": [Training.replace_state, Training.freeze_one, Training.thaw, Training.freeze_one, Training.thaw],
}


@pytest.mark.parametrize("happens", BETWEEN_STEPS.values(), ids=BETWEEN_STEPS.keys())
def test_memory_does_not_grow(spec, happens):
    training = Training(spec)

    def steps(count):
        for between in islice(cycle(happens), count):
            between(training)
            training.optimizer.step()

    steps(repetitions(1000))
    memory = Memory()
    steps(repetitions(10_000))
    memory.assert_same()


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

    cycle(30)
    memory = Memory()
    cycle(100)
    memory.assert_same()


def test_no_memory_for_a_step(spec):
    """A step in steady state allocates no tensor of a parameter's size."""
    params = make_params(((256, 256), (1000,)))
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    for _ in range(2):
        optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    largest = max((abs(event.cpu_memory_usage) for event in profile.events()), default=0)
    assert largest <= 4096  # Adafactor: a number for each row and column


def test_failed_steps_do_not_grow(spec):
    params = make_params(SHAPES)
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    optimizer.step()
    option = "step_sizes" if spec.name == "Rprop" else "lr"
    optimizer.param_groups[0][option] = (float("nan"), 1.0) if spec.name == "Rprop" else float("nan")

    def steps(count):
        for _ in range(count):
            with pytest.raises(ValueError, match="NaN"):
                optimizer.step()

    steps(200)
    memory = Memory()
    steps(2000)
    memory.assert_same()


def test_two_optimizers_in_two_threads(spec):
    """Each gets what it gets alone."""
    shapes = ((200, 100), (5,), (3000,))
    runs = [make_params(shapes, seed=10 * i) for i in range(2)]
    alone = [twin(params) for params in runs]
    grads = [[torch.randn(shape) for shape in shapes] for _ in runs]
    without_matrices = {3, 10, 17, 24, 31, 38, 45, 52, 59}

    def train(params, own_grads):
        optimizer = spec.ours(params, **spec.typical)
        for i in range(60):
            for param, grad in zip(params, own_grads, strict=True):
                param.grad = grad * (1 + i)
            if i in without_matrices:
                params[0].grad = None
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


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


MANY = 1000  # tensors, enough for every loop over them to be shared by two threads


@pytest.mark.parametrize(
    "sharing, key",
    [(s, key) for s in SPECS for key in s.keys_of((4,), s.typical)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_one_state_tensor_in_many_places(sharing, key, two_threads):
    """As in optimizers that keep one step count for all parameters. Its references are counted by one thread, and each
    parameter in turn goes on from what the one before it left there, as in torch."""
    params = make_params([(4,)] * MANY)
    twins = twin(params)
    pairs = [(sharing.ours(params, **sharing.typical), params), (sharing.torch(twins, **sharing.typical), twins)]
    owned = []
    for optimizer, of in pairs:
        give_grads(of, 0)
        optimizer.step()
        shared = optimizer.state[of[0]][key]
        for entry in optimizer.state.values():
            entry[key] = shared
        owners = sys.getrefcount(shared)
        for _ in range(2):
            optimizer.step()
        owned.append(sys.getrefcount(shared) - owners)
    if isinstance(pairs[0][0].state[params[0]][key], torch.Tensor):
        assert owned[0] == 0
    assert_close(torch.stack(params), torch.stack(twins), sharing.tolerances[params[0].dtype])


def test_one_gradient_for_many_parameters(two_threads):
    spec = next(spec for spec in SPECS if spec.name == "AdamW")
    params = make_params([(4,)] * MANY)
    optimizer = spec.ours(params, **spec.typical)
    grad = torch.ones(4)
    for param in params:
        param.grad = grad
    optimizer.step()
    owners = sys.getrefcount(grad), grad._use_count()
    for _ in range(50):
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
    assert (sys.getrefcount(grad), grad._use_count()) == owners


def test_one_tensor_in_many_places_of_an_average(two_threads):
    param, average = torch.ones(4), torch.zeros(4)
    averages = [torch.zeros(4) for _ in range(MANY)]
    names = [str(i) for i in range(MANY)]
    of_one_param = _C.AveragePlan([], names, averages, [param] * MANY)
    of_one_average = _C.AveragePlan([], names, [average] * MANY, averages)
    owners = sys.getrefcount(param), sys.getrefcount(average)
    for step in range(50):
        of_one_param.run(0.5)
        of_one_average.run(1 / 8)
        if step == 0:  # each in turn
            assert_close(average, torch.full((4,), 0.5 * (1 - (7 / 8) ** MANY)), Tolerance(1e-5, 0))
    assert (sys.getrefcount(param), sys.getrefcount(average)) == owners
    assert torch.equal(averages[0], averages[-1]) and averages[0].min() > 0.99


def test_step_releases_the_interpreter():
    """Another Python thread runs while the native part of a step does."""
    spec = next(spec for spec in SPECS if spec.name == "AdamW")
    params = [torch.nn.Parameter(torch.zeros(1 << 22))]
    optimizer = spec.ours(params)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    hypers = [optimizer._hypers(group) for group in optimizer.param_groups]
    gate, ran = threading.Lock(), []

    def run():
        with gate:
            ran.append(True)

    interval = sys.getswitchinterval()
    gate.acquire()
    thread = threading.Thread(target=run)
    thread.start()
    sys.setswitchinterval(1000)  # only a release lets the other thread in
    try:
        gate.release()
        for _ in range(200):
            assert optimizer._plan.step(optimizer.state, optimizer.param_groups, hypers, StepControls())
            if ran:
                break
        meanwhile = list(ran)
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert meanwhile


@pytest.mark.only_where(hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.about_the_cpu("a forked process cannot go on with CUDA")
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
                torch.set_num_threads(1)  # torch's own sum would wait for the parent's threads
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
