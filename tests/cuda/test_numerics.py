"""The kernels against torch on the same GPU, and against our own CPU kernels bit by bit."""

import inspect

import pytest
import torch
from lockstep import Lockstep, bits, check_in_half_precision, copy_of, give_grads, make_params, random
from specs import SPECS, Tolerance
from torch import Tensor

WIDE = (torch.float64, torch.complex128)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*WIDE, torch.float32, torch.complex64, *HALF)
# Around the width of an access (16 bytes), of a block (256 threads) and of a chunk (2048 elements and more).
SHAPES = ((), (1,), (3,), (0,), (257,), (31, 33), (2048,), (5, 409), (4097,), (300, 301), (1 << 17,))
# What capturable=True costs torch itself: it computes bias corrections in float32, whatever the parameters are.
CAPTURABLE = Tolerance(2e-5, 1e-5)


def short(dtype):
    return str(dtype).removeprefix("torch.")


def with_half_options(case, dtype):
    return {**(case.spec.half_options if dtype == torch.float16 else {}), **case.options}


def is_tensor(value):
    return any(isinstance(entry, Tensor) for entry in (value if isinstance(value, tuple) else (value,)))


def for_torch(case, options):
    """With torch's loop where its foreach, the default on a GPU, does not serve: it refuses tensors unless capturable,
    and rounds ASGD's rates to float32. Classes that torch does not have know one way only."""
    needs_loop = case.spec.name == "ASGD" or any(map(is_tensor, options.values()))
    has_loop = "foreach" in inspect.signature(case.spec.torch).parameters
    return {**options, "foreach": False} if needs_loop and has_loop and not options.get("capturable") else options


@pytest.mark.parametrize("dtype", (*WIDE, torch.float32, torch.complex64), ids=short)
def test_equals_torch(cuda_case, dtype, device):
    options = for_torch(cuda_case, cuda_case.options)
    lockstep = Lockstep(cuda_case.spec, options, dtype=dtype, device=device).step(5)
    tolerance = lockstep.tolerance()
    lockstep.check(max(tolerance, CAPTURABLE, key=lambda t: t.atol) if options.get("capturable") else tolerance)


@pytest.mark.parametrize("dtype", HALF, ids=short)
def test_equals_torch_in_half_precision(cuda_case, dtype, device):
    options = for_torch(cuda_case, with_half_options(cuda_case, dtype))
    check_in_half_precision(cuda_case.spec, options, dtype, device)


def canonical(tensor):
    """The bits, on whatever device; those of a NaN are free (x86 and NVIDIA make different ones)."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    real = real.cpu()
    return bits(torch.where(real.isnan(), torch.full_like(real, float("nan")), real))


def run(spec, options, params, grads_of, steps=4):
    optimizer = spec.ours(params, **options)
    for step in range(steps):
        grads_of(params, step)
        optimizer.step()
    state = [value for p in params for _, value in sorted(optimizer.state.get(p, {}).items())]
    return [canonical(tensor) for tensor in (*params, *state)]


def on_both(spec, options, shapes, dtype, device, grads_of=give_grads, prepare=lambda params: None):
    """Results of the CPU, and of the GPU with hyper-parameters and step counters on the host and on the device."""
    on_host = {key: value for key, value in options.items() if key not in ("capturable", "fused")}
    kinds = [
        ("cpu", copy_of(on_host)),
        (device, copy_of(on_host)),
        (device, {**copy_of(on_host, device), **spec.device_steps}),
    ]
    results = []
    for place, own in kinds:
        if own.get("fused") and dtype.is_complex:
            continue  # which torch refuses
        params = make_params(shapes, dtype, device=place)
        prepare(params)
        results.append(run(spec, own, params, grads_of))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_same_bits_as_the_cpu(cuda_case, dtype, device):
    options = with_half_options(cuda_case, dtype)
    on_cpu, *on_gpu = on_both(cuda_case.spec, options, SHAPES, dtype, device)
    assert on_gpu and all(result == on_cpu for result in on_gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
def test_same_bits_for_a_thousand_tensors(variant, dtype, device):
    """More than kernel arguments hold, so that the table goes through device memory."""
    shapes = [(1 + 7 * i % 300,) for i in range(1000)]
    on_cpu, *on_gpu = on_both(variant.spec, variant.options, shapes, dtype, device)
    assert all(result == on_cpu for result in on_gpu)


EDGES = [
    0.0,
    -0.0,
    float("inf"),
    -float("inf"),
    float("nan"),
    1e-45,
    -1e-39,
    1e-30,
    3e38,
    -3e38,
    1.0,
    -2.5,
    6e-8,
    65504.0,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=short)
def test_same_bits_at_the_edges(cuda_case, dtype, device):
    """Infinities, NaN and subnormal numbers, every pair of them as parameter and gradient."""
    values = torch.tensor(EDGES, dtype=torch.float64).to(dtype)
    pairs = torch.cartesian_prod(values, values)

    def prepare(params):
        with torch.no_grad():
            params[0].copy_(pairs[:, 0])

    def grads_of(params, step):
        params[0].grad = pairs[:, 1].roll(step).to(params[0].device)

    shapes = ((len(pairs),),)
    on_cpu, *on_gpu = on_both(cuda_case.spec, cuda_case.options, shapes, dtype, device, grads_of, prepare)
    assert all(result == on_cpu for result in on_gpu)


def test_dtypes_mixed_in_one_optimizer(variant, device):
    finals = []
    for place in ("cpu", device):
        dtypes = filter(variant.spec.takes, DTYPES)
        params = [p for dtype in dtypes for p in make_params(((5, 3), (2049,)), dtype, device=place)]
        finals.append(run(variant.spec, copy_of(variant.options), params, give_grads))
    assert finals[1] == finals[0]


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=short)
def test_gradient_of_another_dtype(variant, grad_dtype, device):
    def grads_of(params, step):
        for i, param in enumerate(params):
            param.grad_dtype = grad_dtype
            param.grad = random(param.shape, torch.float64, 100 * step + i).to(grad_dtype).to(param.device)

    finals = []
    for place in ("cpu", device):
        params = make_params(((19, 3), (2049,)), device=place)
        finals.append(run(variant.spec, copy_of(variant.options), params, grads_of))
    assert finals[1] == finals[0]


def transposed(t):
    return t.mT.contiguous().mT


def every_second(t):
    return torch.stack([t, t], -1)[..., 0]


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def misaligned(t):
    """Dense, but starting in the middle of a 16-byte word."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def same(t):
    return t


LAYOUTS = [
    (same, same),
    (transposed, same),
    (same, transposed),
    (transposed, transposed),
    (channels_last, same),
    (channels_last, channels_last),
    (every_second, same),
    (same, every_second),
    (every_second, every_second),
    (misaligned, same),
    (same, misaligned),
    (misaligned, misaligned),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=short)
@pytest.mark.parametrize(("of_param", "of_grad"), LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(spec, of_param, of_grad, dtype, device):
    def prepare(params):
        for param in params:
            param.data = of_param(param.data)

    def grads_of(params, step):
        give_grads(params, step)
        for param in params:
            param.grad = of_grad(param.grad)

    shapes = ((2, 5, 7, 11), (1, 3, 2, 2), (4, 8, 16, 16))
    options = {**spec.typical, **spec.half_options}
    on_cpu, *on_gpu = on_both(spec, options, shapes, dtype, device, grads_of, prepare)
    assert all(result == on_cpu for result in on_gpu)


def test_a_step_of_a_view_leaves_its_neighbours_alone(spec, device):
    whole = random((64, 66), torch.float32, 1, device)
    before = whole.clone()
    param = torch.nn.Parameter(whole[1:-1, 1:-1])
    optimizer = spec.ours([param], **spec.typical)
    for step in range(3):
        give_grads([param], step)
        optimizer.step()
    assert not torch.equal(whole[1:-1, 1:-1], before[1:-1, 1:-1])
    whole[1:-1, 1:-1] = before[1:-1, 1:-1]
    assert torch.equal(whole, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_frozen_and_thawed(variant, dtype, device):
    finals = []
    for place in ("cpu", device):

        def grads_of(params, step):
            give_grads(params, step, [{0}, {0, 3}, set(), {1, 2, 4}, set(range(7)), {2}][step])

        params = make_params(dtype=dtype, device=place)
        finals.append(run(variant.spec, copy_of(variant.options), params, grads_of, steps=6))
    assert finals[1] == finals[0]


LARGE = (1 << 31) + 5


def need(count, device):
    free, _ = torch.cuda.mem_get_info(device)
    if free < count:
        pytest.skip(f"takes {count >> 30} GiB of GPU memory, {free >> 30} are free")


@pytest.fixture
def emptied():
    """Large tensors go back to the system before and after, for other processes on the same GPU."""
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def test_more_than_two_to_the_31_elements(device, emptied):
    spec = next(row for row in SPECS if row.name == "SGD")
    need(3 * 2 * LARGE, device)
    param = torch.nn.Parameter(torch.zeros(LARGE, dtype=torch.bfloat16, device=device))
    param.grad = torch.ones_like(param)
    param.grad[-3:] = 2
    spec.ours([param], lr=1.0).step()
    assert param[-3:].tolist() == [-2.0] * 3
    ordinary = param.detach()[:-3]
    assert (ordinary.amin().item(), ordinary.amax().item()) == (-1.0, -1.0)


def test_strides_that_reach_beyond_two_to_the_31(device, emptied):
    spec = next(row for row in SPECS if row.name == "SGD")
    need(2 * 2 * LARGE, device)
    memory = torch.zeros(LARGE, dtype=torch.bfloat16, device=device)
    param = torch.nn.Parameter(memory[::2])
    param.grad = torch.ones(param.shape, dtype=torch.bfloat16, device=device)
    spec.ours([param], lr=1.0).step()
    assert (param.detach().amin().item(), param.detach().amax().item()) == (-1.0, -1.0)
    assert (memory[1::2].amin().item(), memory[1::2].amax().item()) == (0.0, 0.0)
