"""The double behaves as CUDA does: streams and events, capture, memory, two devices."""

import pytest
import torch

import optim_ext


def prints(run, code, expected, how=""):
    done = run(code, how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected.split()


LATE_COPY = """
source = torch.ones(4, pin_memory=True)
target = torch.zeros(4, device="cuda")
torch.cuda.synchronize()
target.copy_(source, non_blocking=True)
source.fill_(7)
print(int(target.sum()))
"""


def test_a_lazy_device_reads_what_the_host_has_changed_meanwhile(run_on_double):
    """Which is how a host that does not wait is found out. With an event in between it is right again."""
    prints(run_on_double, LATE_COPY, "4")
    prints(run_on_double, LATE_COPY, "28", how="lazy")
    waiting = LATE_COPY.replace("source.fill_(7)", "torch.cuda.current_stream().synchronize(); source.fill_(7)")
    prints(run_on_double, waiting, "4", how="lazy")


def test_streams_wait_for_events_only(run_on_double):
    code = """
one, other = torch.cuda.Stream(), torch.cuda.Stream()
value, seen = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
torch.cuda.synchronize()
with torch.cuda.stream(one):
    value.fill_(1)
    event = one.record_event()
if WAITS:
    other.wait_event(event)
with torch.cuda.stream(other):
    seen.add_(value)
other.synchronize()
print(int(seen))
"""
    prints(run_on_double, code.replace("WAITS", "True"), "1", how="lazy")
    prints(run_on_double, code.replace("WAITS", "False"), "0", how="lazy")


def test_an_operation_that_refuses_its_arguments_leaves_the_stream_as_it_was(run_on_double):
    code = """
whole = torch.ones(3, dtype=torch.int64, device="cuda")
try:
    torch._foreach_addcdiv_([whole], [whole.clone()], [whole.clone()])
except RuntimeError as error:
    print("Integer division" in str(error))
for _ in range(3):
    whole.add_(1)
torch.cuda.synchronize()
print(int(whole.sum()))
"""
    prints(run_on_double, code, "True 12")


def test_autograd_sees_what_lists_write(run_on_double):
    code = """
one = torch.ones(3, device="cuda")
for write in (lambda: one.mul_(2), lambda: torch._foreach_mul_([one], 2.0)):
    before = one._version
    write()
    print(one._version - before)
"""
    prints(run_on_double, code, "1 1")


def test_a_graph_runs_when_it_is_replayed(run_on_double):
    code = """
value = torch.zeros((), device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    value.add_(1)
    doubled = value * 2
print(int(value))
for _ in range(3):
    graph.replay()
print(int(value), int(doubled))
"""
    for how in ("", "lazy"):
        prints(run_on_double, code, "0 3 6", how)


def test_a_captured_step_takes_its_tables_along():
    """In the arguments of several launches: memory for a table would be another's by the time of a replay."""
    from cuda_double import device_trace

    params = [torch.nn.Parameter(torch.zeros(8, device="cuda")) for _ in range(1000)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = optim_ext.SGD(params, lr=1.0)
    optimizer.step()

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()

    trace = device_trace(capture)
    assert trace.copies == [] and 1 < len(trace.kernels) < 10


def test_waiting_spoils_a_capture(run_on_double):
    code = """
value = torch.zeros((), device="cuda")
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        value.item()
except RuntimeError as error:
    print("captur" in str(error))
"""
    prints(run_on_double, code, "True")


def test_memory_begins_as_nan_and_runs_out(run_on_double):
    code = """
print(bool(torch.empty(1000, device="cuda").isnan().all()))
try:
    torch.empty(7 << 30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("none left")
print(torch.cuda.mem_get_info()[1] >> 30)
"""
    prints(run_on_double, code, "True none left 6")


def test_devices_are_two(run_on_double):
    code = """
print(torch.cuda.device_count(), torch.cuda.is_available())
tensor = torch.arange(6.0, device="cuda:1")
there = tensor.to("cuda:0")
print(there.device, int(there.sum()), (tensor + 1).device)
"""
    prints(run_on_double, code, "2 True cuda:0 15 cuda:1")


@pytest.mark.parametrize("how", ["", "closed", "lazy,closed", "guard", "lazy,guard"])
def test_a_step_of_adamw_has_the_cpus_bits(run_on_double, how):
    code = """
finals = []
for place in ("cpu", "cuda:0", "cuda:1"):
    param = torch.nn.Parameter(torch.linspace(-1, 1, 5000).to(place))
    optimizer = optim_ext.AdamW([param])
    for step in range(3):
        param.grad = torch.linspace(-step, 2, 5000).to(place)
        optimizer.step()
    finals.append(param.detach().cpu())
print(all(torch.equal(final, finals[0]) for final in finals))
"""
    prints(run_on_double, code, "True", how)
