"""On a GPU, too, an optimizer of ours is torch's: flags, GradScaler, checkpoints, devices, bad input."""

import copy

import pytest
import torch
from lockstep import Lockstep, assert_same_state, bits, copy_of, give_grads, make_params, native_ops, snapshot
from specs import SPECS, VARIANTS, Tolerance

import optim_ext

FUSED = [spec for spec in SPECS if spec.fused]
ADAMS = [spec for spec in SPECS if spec.betas]
COUNTING = [spec for spec in SPECS if "step" in spec.state(spec.typical)]
several_devices = pytest.mark.only_where(torch.cuda.device_count() > 1, reason="there are several GPUs")


def name(spec):
    return spec.name


def test_kernels_are_registered_and_native(cuda_case, device):
    spec = cuda_case.spec
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"optim_ext::{spec.op}", "CUDA")
    params = make_params(device=device)
    optimizer = spec.ours(params, **copy_of(cuda_case.options))
    give_grads(params, 0)
    assert [report.native for report in optim_ext.explain(optimizer)] == [True]
    assert native_ops(optimizer.step) == [f"optim_ext::{spec.op}"]


def test_flags_change_nothing(spec, device):
    finals = []
    for flags in (*spec.flags, spec.device_steps):
        params = make_params(device=device)
        optimizer = spec.ours(params, **spec.typical, **flags)
        for step in range(4):
            give_grads(params, step)
            optimizer.step()
        finals.append([bits(p) for p in params])
    assert all(final == finals[0] for final in finals)


@pytest.mark.parametrize("flag", ["capturable", "fused"])
@pytest.mark.parametrize("adam", ADAMS, ids=name)
def test_counters_are_where_torch_has_them(adam, flag, device):
    lockstep = Lockstep(adam, {**adam.typical, flag: True}, device=device).step(3)
    lockstep.check(Tolerance(2e-5, 1e-5))  # compares devices and dtypes of all state, too
    for optimizer in lockstep.both:
        assert {entries["step"].device for entries in optimizer.state.values()} == {device}


def test_capturable_with_a_counter_on_the_cpu_is_torchs_error(device):
    for spec in COUNTING:
        if "capturable" not in spec.torch(make_params()).defaults:
            continue
        for make in (spec.torch, spec.ours):
            params = make_params(device=device)
            optimizer = make(params, **spec.typical)
            give_grads(params, 0)
            optimizer.step()
            if all(entries["step"].device == device for entries in optimizer.state.values()):
                continue  # where torch keeps those of ASGD always
            optimizer.param_groups[0]["capturable"] = True
            before = snapshot(optimizer)
            with pytest.raises(AssertionError, match="supported devices"):
                optimizer.step()
            if make is spec.ours:
                assert snapshot(optimizer) == before


# What torch keeps in one element beside a count, and by it.
NUMBERED = [spec for spec in COUNTING if spec.numbers & spec.state(spec.typical) != {"step"}]


@pytest.mark.parametrize("numbered", NUMBERED, ids=name)
def test_numbers_follow_a_count_that_was_moved(numbered, device):
    """As torch.compile does, which moves counts to the device, and nothing else."""
    params, twins = make_params(device=device), make_params()
    ours, other = (numbered.ours(own, **numbered.typical) for own in (params, twins))
    for step in range(4):
        for own in (params, twins):
            give_grads(own, step)
        if step == 2:
            for entries in ours.state.values():
                entries.update({key: entries[key].cpu() for key in numbered.numbers}, step=entries["step"].to(device))
        ours.step()
        other.step()
    assert [bits(p) for p in params] == [bits(p) for p in twins]
    assert {entries[key].device for entries in ours.state.values() for key in numbered.numbers} == {device}


@pytest.mark.parametrize("numbered", NUMBERED, ids=name)
def test_capturable_with_another_number_on_the_cpu_is_torchs_error(numbered, device):
    for make in (numbered.torch, numbered.ours):
        params = make_params(device=device)
        optimizer = make(params, **numbered.typical, capturable=True)
        give_grads(params, 0)
        optimizer.step()
        for entries in optimizer.state.values():
            entries.update({key: entries[key].cpu() for key in numbered.numbers - {"step"}})
        before = snapshot(optimizer)
        with pytest.raises(AssertionError, match="supported devices"):
            optimizer.step()
        if make is numbered.ours:
            assert snapshot(optimizer) == before


# GradScaler.


@pytest.mark.parametrize("spec_with_scaler", FUSED, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_scaled_and_skipped_steps_equal_the_cpus(spec_with_scaler, dtype, device, no_sync):
    """What GradScaler leaves on a fused optimizer; nothing is waited for, skipped or not."""
    spec = spec_with_scaler
    finals = []
    for place in ("cpu", device):
        params = make_params(dtype=dtype, device=place)
        optimizer = spec.ours(params, **{**spec.typical, **spec.half_options}, fused=True)
        for step, found in enumerate((0.0, 1.0, 0.0, 0.0)):
            give_grads(params, step)
            optimizer.grad_scale = None if step == 3 else torch.full((), 8.0, device=place)
            optimizer.found_inf = torch.full((), found, device=place)
            before = [bits(p) for p in params]
            if place == "cpu":
                optimizer.step()
            else:
                with no_sync:
                    optimizer.step()
            assert ([bits(p) for p in params] == before) == (found == 1.0)
        state = [v for p in params for _, v in sorted(optimizer.state.get(p, {}).items())]
        finals.append([bits(t) for t in (*params, *state, *(p.grad for p in params))])
    assert finals[1] == finals[0]


def train(make, options, scaler, device):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8)).to(device)
    optimizer = make(model.parameters(), **options)
    for step, data in enumerate(torch.randn(5, 4, 8).to(device)):
        optimizer.zero_grad()
        loss = (model(data) - data).square().sum()
        if scaler is None:
            if step != 2:
                loss.backward()
                optimizer.step()
            continue
        scaler.scale(loss).backward()
        if step == 2:
            model[2].weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
    return [p.detach() for p in model.parameters()]


def test_grad_scaler(spec, device):
    reference = train(spec.torch, spec.typical, None, device)
    for flags in spec.flags:
        scaler = torch.amp.GradScaler("cuda", init_scale=128.0, growth_interval=100)
        found = train(spec.ours, {**spec.typical, **flags}, scaler, device)
        assert scaler.get_scale() == 64.0
        for mine, other in zip(found, reference, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec_with_scaler", FUSED, ids=name)
def test_a_fused_optimizer_with_the_counters_of_another_checkpoint(spec_with_scaler, device):
    """Saved without `fused`, a checkpoint brings that option and counters on the CPU along. GradScaler goes on leaving
    its word to the step, which then counts on the device."""
    spec = spec_with_scaler
    params, twins = make_params(device=device), make_params(device=device)
    saved, loaded = spec.ours(twins, **spec.typical), spec.ours(params, **spec.typical, fused=True)
    give_grads(twins, 0)
    saved.step()
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            p.copy_(q)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))  # else the two share what needs no cast
    for step, found in enumerate((0.0, 1.0, 0.0)):
        for own in (params, twins):
            give_grads(own, step)
        loaded.found_inf = torch.full((), found, device=device)
        loaded.step()
        if not found:
            saved.step()
    assert [bits(p) for p in params] == [bits(p) for p in twins]
    steps = {entries["step"].device for entries in loaded.state.values() if "step" in entries}
    assert steps <= {device}


@pytest.mark.parametrize("spec_with_scaler", FUSED, ids=name)
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_scaler_on_the_gpu_and_a_parameter_on_the_cpu(spec_with_scaler, found, device):
    """The values follow the parameters to their device, and have arrived before they are read."""
    spec = spec_with_scaler
    params = [*make_params(((500,),)), *make_params(((500,),), device=device)]
    optimizer = spec.ours(params, **spec.typical, fused=True)
    give_grads(params, 0)
    for param in params:
        param.grad = params[0].grad.to(param.device)
    with torch.no_grad():
        params[1].copy_(params[0])
    before = bits(params[0])
    scale, verdict = torch.full((), 4.0, device=device), torch.zeros((), device=device)
    torch.cuda._sleep(100_000_000)
    scale.fill_(2.0)
    verdict.fill_(found)
    optimizer.grad_scale, optimizer.found_inf = scale, verdict
    optimizer.step()
    assert (bits(params[0]) == before) == (found == 1.0)
    assert bits(params[1]) == bits(params[0])


# Devices.


def test_parameters_on_cpu_and_gpu_in_one_group(variant, device):
    params = [p for pair in zip(make_params(), make_params(device=device), strict=True) for p in pair]
    optimizer = variant.spec.ours(params, **copy_of(variant.options))
    for step in range(3):
        give_grads(params, step)
        for i in range(0, len(params), 2):
            params[i + 1].grad = None if params[i].grad is None else params[i].grad.to(device)
        if step == 0:
            with torch.no_grad():
                for i in range(0, len(params), 2):
                    params[i + 1].copy_(params[i])
        optimizer.step()
    for i in range(0, len(params), 2):
        assert bits(params[i + 1]) == bits(params[i])
        for key, value in optimizer.state.get(params[i], {}).items():
            found = optimizer.state[params[i + 1]][key]
            assert bits(found) == bits(value)
            assert key in variant.spec.numbers or found.device == device


def test_parameters_of_the_cpu_with_a_learning_rate_on_the_gpu(spec, device):
    params, others = make_params(), make_params()
    optimizers = [
        spec.ours(params, **{**spec.typical, "lr": torch.tensor(0.01, device=device)}),
        spec.ours(others, **{**spec.typical, "lr": torch.tensor(0.01)}),
    ]
    for step in range(3):
        give_grads(params, step)
        give_grads(others, step)
        for optimizer in optimizers:
            optimizer.step()
    assert [bits(p) for p in params] == [bits(p) for p in others]


@several_devices
def test_several_gpus(variant):
    """Each device gets its own call, on its own current stream, whichever device is current."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    runs = [make_params(device=place) for place in devices]
    params = [p for same in zip(*runs, strict=True) for p in same]
    optimizer = variant.spec.ours(params, **copy_of(variant.options))
    for step, current in enumerate([*devices, *devices[:1]]):
        for own in runs:
            give_grads(own, step)
        with torch.cuda.device(current):
            optimizer.step()
    for own in runs[1:]:
        assert [bits(p) for p in own] == [bits(p) for p in runs[0]]


# Checkpoints.


@pytest.mark.parametrize(
    ("first", "second", "flags"),
    [
        ("cpu", "cuda", "host counters"),
        ("cuda", "cpu", "host counters"),
        ("cuda", "cuda", "host counters"),
        ("cuda", "cuda", "device counters"),  # by capturable, which is for GPUs and part of a checkpoint
    ],
)
def test_checkpoints_move_between_devices(variant, first, second, flags, tmp_path):
    """Half the steps on one device, saved, loaded, the rest on the other: the same bits as all of them on the CPU."""
    spec = variant.spec
    options = {**variant.options, **(spec.device_steps if flags == "device counters" else {})}

    def steps(optimizer, params, numbers):
        for step in numbers:
            give_grads(params, step)
            optimizer.step()

    reference = make_params()
    steps(spec.ours(reference, **copy_of(variant.options)), reference, range(6))
    params = make_params(device=first)
    optimizer = spec.ours(params, **copy_of(options))
    steps(optimizer, params, range(3))
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")

    saved = torch.load(tmp_path / "saved.pt", map_location=second, weights_only=True)
    resumed = [torch.nn.Parameter(p.to(second)) for p in saved["params"]]
    continued = spec.ours(resumed, **copy_of(options))
    continued.load_state_dict(saved["optimizer"])
    steps(continued, resumed, range(3, 6))
    assert [bits(p) for p in resumed] == [bits(p) for p in reference]


# Torch's foreach takes no tensors as options.
OF_NUMBERS = [case for case in VARIANTS if not any(isinstance(v, torch.Tensor) for v in case.options.values())]


@pytest.mark.parametrize("variant", OF_NUMBERS, ids=[case.id for case in OF_NUMBERS])
def test_checkpoints_to_and_from_torch(variant, device):
    spec = variant.spec
    lockstep = Lockstep(spec, variant.options, device=device).step(2)
    mine, other = lockstep.ours.state_dict(), lockstep.theirs.state_dict()
    lockstep.ours.load_state_dict(other)
    lockstep.theirs.load_state_dict(mine)
    lockstep.step(2).check()


# Bad input.


def refused(optimizer, error, *words):
    before = snapshot(optimizer)
    with pytest.raises(error) as caught:
        optimizer.step()
    for word in words:
        assert word in str(caught.value)
    assert snapshot(optimizer) == before


def test_state_on_the_wrong_device(spec, device):
    """Named, before anything is written; the same optimizer works once it is mended."""
    params = make_params(device=device)
    optimizer = spec.ours([{"params": params[:3]}, {"params": params[3:]}], **spec.typical)
    give_grads(params, 0)
    optimizer.step()
    for key in spec.state_of(params[5].shape, spec.typical):
        right = optimizer.state[params[5]][key]
        optimizer.state[params[5]][key] = right.cpu()
        refused(optimizer, RuntimeError, "parameter 2 of group 1", "cpu", "cuda:0")
        optimizer.state[params[5]][key] = right
    optimizer.step()


def test_bad_input_of_one_device_leaves_the_other_alone(spec, device):
    params = [*make_params(), *make_params(device=device)]
    optimizer = spec.ours(params, **spec.typical)
    give_grads(params, 0)
    optimizer.step()
    for broken in (params[5], params[-1]):
        key = next(iter(spec.state_of(broken.shape, spec.typical)))
        right = optimizer.state[broken][key]
        optimizer.state[broken][key] = torch.zeros(7, device=broken.device)
        refused(optimizer, RuntimeError, "shape")
        optimizer.state[broken][key] = right
    optimizer.step()


def test_an_op_that_may_skip_refuses_counters_on_the_cpu(device):
    """Optimizers move them first; whoever calls the op is told."""
    param, grad, exp_avg, exp_avg_sq = (torch.ones(3, device=device) for _ in range(4))
    with pytest.raises(
        RuntimeError, match=r"state_steps\[0\] is on cpu, but .* is known on cuda:0 only; move it there"
    ):
        torch.ops.optim_ext.lamb_(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [torch.tensor(0.0)],
            lr=torch.tensor(0.1),
            beta1=0.9,
            beta2=0.99,
            eps=1e-6,
            weight_decay=0.0,
            maximize=False,
            found_inf=torch.zeros((), device=device),
        )
    assert torch.equal(param, torch.ones_like(param)) and torch.equal(exp_avg, torch.ones_like(param))


def test_overlapping_parameters_step_in_turn(spec, device):
    wholes = [torch.arange(10.0, device=device), torch.arange(10.0)]
    for whole in wholes:
        params = [torch.nn.Parameter(whole[:6]), torch.nn.Parameter(whole[5:])]
        optimizer = spec.ours(params, **spec.typical)
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
    torch.testing.assert_close(wholes[0].cpu(), wholes[1])


def test_same_state_as_torchs(spec, device):
    """Keys, dtypes, shapes and devices of a state_dict, for each flag."""
    for flags in spec.flags:
        if spec.name == "Adagrad" and flags.get("fused"):
            continue  # which torch has on a GPU since 2.14 only
        lockstep = Lockstep(spec, {**spec.typical, **flags}, device=device).step(2)
        assert_same_state(lockstep.ours, lockstep.theirs, Tolerance(2e-5, 1e-5))
