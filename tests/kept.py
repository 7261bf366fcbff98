"""Optimizers whose parameters and state are kept in other ways than torch's, and what these ways are."""

import dataclasses
from itertools import product

import torch
from lockstep import copy_of, random
from specs import SPECS, Spec

from optim_ext._precision import codecs
from optim_ext._tables import TABLES

# Muon takes matrices only, so it is no row of those that all tests share.
MUON = Spec(
    "Muon",
    whole_tensors=True,
    op="muon_",
    state=lambda options: {"momentum_buffer"},
    grid=(),
    typical={"lr": 0.02, "weight_decay": 0.1},
    numbers=frozenset(),
    fused=False,
    is_real=True,
)
SPARSE_ADAM = Spec("SparseAdam", op="sparse_adam_", state=lambda o: {"exp_avg", "exp_avg_sq"}, grid=(), typical={})
TAKING = [*(spec for spec in SPECS if TABLES[spec.op].takes_companions), MUON]
# Those that take sparse gradients: if they are asked to, and unasked.
LAZY = [spec for spec in TAKING if TABLES[spec.op].is_element_wise]
NOT_ASKED = [SPARSE_ADAM, *(dataclasses.replace(spec, typical=spec.sparse) for spec in LAZY if spec.sparse)]
TAKING_SPARSE = [*LAZY, *NOT_ASKED]
NAMES_OF_TAKING_SPARSE = [*(f"lazy {spec.name}" for spec in LAZY), *(spec.name for spec in NOT_ASKED)]
WAYS = [
    {"param_precision": param, "state_precision": state}
    for param, state in product(("master", "remainder", "kahan", "stochastic"), ("native", "fp32", "bf16", "q8"))
]
SHAPES = ((), (7,), (0,), (3, 5), (17, 33), (64, 100))


def name_of(way):
    return " ".join(str(value) for value in way.values())


def shapes_for(spec, shapes=SHAPES):
    return [shape for shape in shapes if spec is not MUON or len(shape) == 2]


def make(spec, way, options=None, shapes=SHAPES, dtype=torch.bfloat16, seed=0):
    params = [torch.nn.Parameter(random(shape, dtype, seed + i)) for i, shape in enumerate(shapes_for(spec, shapes))]
    return spec.ours(params, **copy_of(spec.typical if options is None else options), **way), params


def give_grads(params, step):
    for i, param in enumerate(params):
        param.grad = random(param.shape, torch.bfloat16, 1000 * (step + 1) + i).to(param.dtype)


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        give_grads(params, step)
        optimizer.step()


def value_of(optimizer, p):
    """What a parameter and what lies beside it are together, in float32."""
    entry, wide = optimizer.state[p], p.detach().float()
    if "master_param" in entry:
        return entry["master_param"]
    if "param_remainder" in entry:
        return codecs.join_remainder(p, entry["param_remainder"])
    return wide + entry["kahan_comp"].float() if "kahan_comp" in entry else wide


def everything(optimizer):
    """The bits of all parameters and all their state."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found.append(p.detach().clone())
            found += [
                value.clone() for _, value in sorted(optimizer.state.get(p, {}).items()) if torch.is_tensor(value)
            ]
    return [
        tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8) for tensor in found
    ]


def same(ones, others):
    return len(ones) == len(others) and all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))
