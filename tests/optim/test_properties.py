"""Hypothesis looks for shapes, strides, dtypes, freezing patterns and groups on which we differ from torch's for-loop."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from lockstep import assert_close, assert_same_state, copy_of, random, widen_hypers
from specs import Tolerance

TIGHT = Tolerance(1e-9, 1e-11)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


@st.composite
def layouts(draw):
    """(shape, permutation, steps): a dense tensor permuted and then sliced along each dimension."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    if draw(st.integers(0, 9)) == 0:
        shape = [draw(st.integers(250, 1100))]
    permutation = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    return shape, permutation, steps


def build(layout, dtype, seed):
    """A tensor of the layout's shape whose memory is permuted and strided as it says."""
    shape, permutation, steps = layout
    roomy = [shape[d] * steps[d] for d in permutation]
    inverse = [permutation.index(d) for d in range(len(shape))]
    tensor = torch.zeros(roomy, dtype=dtype).permute(inverse)
    tensor = tensor[tuple(slice(None, None, s) for s in steps)] if shape else tensor
    assert list(tensor.shape) == list(shape)
    return tensor.copy_(random(shape, dtype, seed))


def same_shape(layout, draw):
    shape = layout[0]
    permutation = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
    return shape, permutation, steps


@settings(max_examples=120)
@given(data=st.data())
def test_equals_torchs_for_loop(spec, data):
    draw = data.draw
    dtype = draw(st.sampled_from([d for d in (torch.float64, torch.complex128) if spec.takes(d)]))
    param_layouts = draw(st.lists(layouts(), min_size=1, max_size=6))
    params = [torch.nn.Parameter(build(layout, dtype, i)) for i, layout in enumerate(param_layouts)]
    twins = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]

    cuts = sorted(draw(st.sets(st.integers(1, len(params)), max_size=2)))
    bounds = list(zip([0, *cuts], [*cuts, len(params)], strict=True))
    options = [draw(st.sampled_from(spec.options)) for _ in bounds]
    optimizers = []
    for make, own in ((spec.ours, params), (spec.torch, twins)):
        groups = [{"params": own[a:b], **copy_of(o)} for (a, b), o in zip(bounds, options, strict=True)]
        optimizers.append(make(groups))
    widen_hypers(optimizers[1])

    for step in range(draw(st.integers(1, 4))):
        frozen = draw(st.sets(st.integers(0, len(params) - 1)))
        for i, layout in enumerate(param_layouts):
            if i in frozen:
                params[i].grad = twins[i].grad = None
                continue
            grad = build(same_shape(layout, draw), dtype, 100 * (step + 1) + i)
            params[i].grad = grad
            twins[i].grad = grad.clone(memory_format=torch.contiguous_format)
        kept = [None if p.grad is None else p.grad.clone() for p in params]
        for optimizer in optimizers:
            optimizer.step()
        for param, grad in zip(params, kept, strict=True):
            assert grad is None or torch.equal(param.grad, grad)
    for i, (mine, other) in enumerate(zip(params, twins, strict=True)):
        assert_close(mine, other, TIGHT, f"parameter {i}")
    assert_same_state(*optimizers, TIGHT)


@settings(max_examples=60)
@given(data=st.data())
def test_mixed_dtypes_equal_each_alone(spec, data):
    """A list of many dtypes at once gives the bytes each tensor gets alone."""
    draw = data.draw
    dtypes = draw(
        st.lists(
            st.sampled_from([d for d in DTYPES if spec.takes(d)]),
            min_size=1,
            max_size=6,
        )
    )
    drawn = [draw(layouts()) for _ in dtypes]
    options = {**draw(st.sampled_from(spec.options)), **spec.half_options}

    def parameters():
        return [
            torch.nn.Parameter(build(layout, d, i)) for i, (layout, d) in enumerate(zip(drawn, dtypes, strict=True))
        ]

    together, alone = parameters(), parameters()
    optimizer = spec.ours(together, **copy_of(options))
    singles = [spec.ours([param], **copy_of(options)) for param in alone]
    for step in range(2):
        for i, (a, b) in enumerate(zip(together, alone, strict=True)):
            a.grad = b.grad = random(a.shape, a.dtype, 50 * step + i)
        for one in (optimizer, *singles):
            one.step()
    for i, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert_close(a, b, Tolerance(0, 0), f"parameter {i}")
