"""State of other programs' optimizers loads into ours, however these keep it; what is not understood is refused."""

import copy
import importlib.util
import io
import socket
import subprocess
import sys

import peers
import pytest
import torch
from kept import WAYS, give_grads, name_of, value_of
from lockstep import random

import optim_ext as optim
from optim_ext import checkpoints

SHAPES = ((64, 100), (64, 64), (7,), (3, 5))
NAMES = ["one.weight", "two.weight", "one.bias", "odd"]


@pytest.fixture(params=[{}, *WAYS], ids=lambda way: name_of(way) or "plain")
def way(request):
    return request.param


def masters():
    return [random(shape, torch.float32, 90 + i) for i, shape in enumerate(SHAPES)]


def make(cls=optim.AdamW, dtype=torch.bfloat16, shapes=SHAPES, **options):
    params = [torch.nn.Parameter(random(shape, torch.float32, 90 + i).to(dtype)) for i, shape in enumerate(shapes)]
    return cls(list(zip(NAMES, params, strict=True)), **options), params


def check_loads(saved, expected, way, with_masters=False, dtype=torch.bfloat16):
    """Into an optimizer that keeps things in this way; which then has what it makes of these float32 values itself."""
    saved = copy.deepcopy(saved)  # counts are shared with what is loaded, as torch does it
    optimizer, params = make(dtype=dtype, **way)
    before = [p.detach().clone() for p in params]
    optimizer.load_state_dict(saved)
    wide, wide_params = make(dtype=torch.float32)
    wide.load_state_dict(saved)
    for p, q, old, (m, v) in zip(params, wide_params, before, expected, strict=True):
        assert torch.equal(p, old)
        assert torch.equal(wide.state[q]["exp_avg"], m) and torch.equal(wide.state[q]["exp_avg_sq"], v)
        assert float(optimizer.state[p]["step"]) == 3.0
        if with_masters and way.get("param_precision") in ("master", "remainder"):
            master = random(p.shape, torch.float32, 90 + find(params, p))
            off = value_of(optimizer, p).view(torch.int32) - master.view(torch.int32)
            halfway = (
                master.view(torch.int32) & 0xFFFF == 0x8000
            )  # rounds to even, where a remainder rounds away from zero
            assert off[~halfway].eq(0).all()
            assert off.abs().max() <= (way["param_precision"] == "remainder")
    reference, others = make(dtype=dtype, **way)
    for p, (m, v) in zip(others, expected, strict=True):
        reference.state[p] = {"step": torch.tensor(3.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    for mine, other in zip(params, others, strict=True):
        reference._convert(reference.param_groups[0], find(others, other))
        for key in ("exp_avg", "exp_avg_sq", "exp_avg::q8", "exp_avg::scale"):
            one, two = optimizer.state[mine].get(key), reference.state[other].get(key)
            assert (one is None and two is None) or torch.equal(one, two), key
    give_grads(params, 0)
    optimizer.step()


def find(params, p):
    return next(i for i, other in enumerate(params) if other is p)


# --- torchao ---


def decoded(value):
    return value.dequantize(torch.float32) if isinstance(value, peers.FewBits) else value


def test_torchao(way):
    source = peers.of_torchao(peers.moments(SHAPES))
    optimizer, _ = make(**way)
    saved = checkpoints.from_torchao(source, optimizer)
    assert not optimizer.state
    expected = [(decoded(entry["exp_avg"]), decoded(entry["exp_avg_sq"])) for entry in source["state"].values()]
    check_loads(saved, expected, way)
    (group,) = saved["param_groups"]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-7, 0.1)
    assert group["lr"] == pytest.approx(0.02) and isinstance(group["lr"], float)


def test_torchao_with_parameters_that_have_not_stepped_and_amsgrad():
    source = peers.of_torchao(peers.moments(SHAPES))
    del source["state"][2]
    source["param_groups"][0]["amsgrad"] = True
    for entry in source["state"].values():
        entry["max_exp_avg_sq"] = entry["exp_avg_sq"]
    optimizer, params = make()
    saved = checkpoints.from_torchao(source, optimizer)
    optimizer.load_state_dict(saved)
    assert params[2] not in optimizer.state or not optimizer.state[params[2]]
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    del source["state"][0]["max_exp_avg_sq"]
    with pytest.raises(ValueError, match="parameter 'one.weight': AdamW keeps 'max_exp_avg_sq' under these options"):
        checkpoints.from_torchao(source, make()[0])


# --- bitsandbytes ---


@pytest.mark.parametrize("block", [256, 2048, None])
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "flat"])
def test_bitsandbytes(block, wrapped):
    values = peers.moments(SHAPES)
    source = peers.of_bitsandbytes(values, block, wrapped)
    saved = checkpoints.from_bitsandbytes(source, make()[0])
    expected = []
    for pair in values:
        expected.append(
            tuple(
                v if v.numel() < 4096 else peers.decoded(*peers.coded(v, block or v.numel()), block or v.numel())
                for v in pair
            )
        )
    for way in ({}, {"param_precision": "remainder", "state_precision": "q8"}):
        check_loads(saved, expected, way)
    assert saved["param_groups"][0]["betas"] == (0.8, 0.95)


def test_blocks_of_bitsandbytes_go_through_memory():
    """Whatever the order of the dimensions is."""
    value = random((64, 8, 3, 3), torch.float32, 1).to(memory_format=torch.channels_last)
    in_memory = value.permute(0, 2, 3, 1)
    codes, scale, table = peers.coded(in_memory, 256)
    source = peers.of_bitsandbytes([(torch.zeros(4096), torch.zeros(4096))])
    entry = {"qmap1": table, "qmap2": table, "absmax1": scale, "absmax2": scale}
    entry |= {f"state{i}": codes.permute(0, 3, 1, 2) for i in (1, 2)}
    source["state"][0]["__bnb_optimizer_quant_state__"] = entry
    p = torch.nn.Parameter(value.clone(memory_format=torch.preserve_format))
    saved = checkpoints.from_bitsandbytes(source, optim.AdamW([p]))
    expected = peers.decoded(codes, scale, table, 256).permute(0, 3, 1, 2)
    assert torch.equal(saved["state"][0]["exp_avg"], expected)


@pytest.mark.parametrize(
    ("cls", "key", "betas", "options"),
    [
        (optim.SGD, "momentum_buffer", (0.9, 0.1), {"momentum": 0.9, "dampening": 0.1}),
        (optim.LARS, "momentum_buffer", (0.8, 0.0), {"momentum": 0.8}),
        (optim.Lion, "exp_avg", (0.8, 0.95), {"betas": (0.8, 0.95)}),
        (optim.RMSprop, "square_avg", (0.7, 0.0), {"alpha": 0.7}),
        (optim.Adagrad, "sum", (0.0, 0.0), {"lr": 0.02}),
    ],
)
def test_bitsandbytes_optimizers_with_one_state(cls, key, betas, options):
    values = [(v,) for _, v in peers.moments(SHAPES)]
    source = peers.of_bitsandbytes(values, betas=betas)
    optimizer, params = make(cls, dtype=torch.float32, **({"momentum": 0.5} if cls is optim.SGD else {}))
    optimizer.load_state_dict(checkpoints.from_bitsandbytes(source, optimizer))
    assert options.items() <= optimizer.param_groups[0].items()
    for p, (v,) in zip(params, values, strict=True):
        whole = v if v.numel() < 4096 else peers.decoded(*peers.coded(v, 256), 256)
        assert torch.equal(optimizer.state[p][key], whole)
    give_grads(params, 0)
    optimizer.step()


# --- apex ---


def test_apex(way):
    values = peers.moments(SHAPES)
    optimizer, _ = make(**way)
    saved = checkpoints.from_apex(peers.of_fused_adam(values), optimizer)
    check_loads(saved, values, way)
    saved = checkpoints.from_apex(peers.of_fused_adam(values), optimizer, masters=masters())
    check_loads(saved, values, way, with_masters=True)
    (group,) = saved["param_groups"]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.02, (0.8, 0.95), 1e-7, 0.1)
    assert "bias_correction" not in group and "step" not in group


def test_apex_with_masters_of_its_own():
    values = peers.moments(SHAPES)
    source = peers.of_fp16_optimizer(values, masters())
    way = {"param_precision": "master"}
    optimizer, _ = make(dtype=torch.float16, **way)
    saved = checkpoints.from_apex(source, optimizer)
    check_loads(saved, values, way, with_masters=True, dtype=torch.float16)


def test_apex_optimizers_that_do_not_count():
    values = peers.moments(SHAPES)
    group = {"lr": 0.02, "lr_decay": 0.0, "eps": 1e-7, "weight_decay": 0.1, "params": list(range(4))}
    source = {"state": {i: {"sum": v} for i, (_, v) in enumerate(values)}, "param_groups": [group]}
    with pytest.raises(ValueError, match="parameter 'one.weight': the checkpoint does not say how many steps"):
        checkpoints.from_apex(source, make(optim.Adagrad)[0])
    saved = checkpoints.from_apex(source, make(optim.Adagrad)[0], step=5)
    assert {float(entry["step"]) for entry in saved["state"].values()} == {5.0}
    group = {
        "lr": 0.02,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.1,
        "nesterov": True,
        "params": [0, 1, 2, 3],
    }
    source = {"state": {i: {"momentum_buffer": m} for i, (m, _) in enumerate(values)}, "param_groups": [group]}
    optimizer, params = make(optim.SGD, dtype=torch.float32)
    optimizer.load_state_dict(checkpoints.from_apex(source, optimizer))
    assert optimizer.param_groups[0]["nesterov"] and optimizer.param_groups[0]["momentum"] == 0.9
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, (m, _) in zip(params, values, strict=True))


# --- DeepSpeed ---


def test_universal_checkpoints_of_deepspeed(way, tmp_path):
    values = peers.moments(SHAPES)
    folder = peers.universal_checkpoint(tmp_path, NAMES, values, masters())
    for place in (folder, folder / "zero", str(folder)):
        saved = checkpoints.from_deepspeed(place, make(**way)[0])
    check_loads(saved, values, way, with_masters=True)


def test_universal_checkpoints_without_a_count(tmp_path):
    folder = peers.universal_checkpoint(tmp_path, NAMES, peers.moments(SHAPES), masters(), step=None)
    with pytest.raises(ValueError, match="parameter 'one.weight': the checkpoint does not say .* hand over step="):
        checkpoints.from_deepspeed(folder, make()[0])
    saved = checkpoints.from_deepspeed(folder, make()[0], step=9)
    assert float(saved["state"][0]["step"]) == 9.0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_what_processes_of_zero_have_saved(way, world):
    values = peers.moments(SHAPES)
    saved = checkpoints.from_deepspeed(peers.zero_ranks(NAMES, values, masters(), world), make(**way)[0])
    check_loads(saved, values, way, with_masters=True)


# --- what is not understood ---

VALUES = peers.moments(SHAPES)


def changed(source, change):
    change(source)
    return source


@pytest.mark.parametrize(
    ("take", "source", "message"),
    [
        (checkpoints.from_torchao, {"offloaded": {}, "on-device": {}}, "found 'offloaded', 'on-device'"),
        (checkpoints.from_torchao, None, "found NoneType"),
        (
            checkpoints.from_torchao,
            peers.of_torchao(VALUES[:3]),
            r"groups of \[3\] parameters and this AdamW of \[4\]: make it with the same parameters",
        ),
        (
            checkpoints.from_torchao,
            peers.of_torchao(peers.moments(((64, 100), (64, 64), (8,), (3, 5)))),
            r"parameter 'one.bias': 'exp_avg' has shape \[8\], expected \[7\]",
        ),
        (
            checkpoints.from_torchao,
            changed(peers.of_torchao(VALUES), lambda s: s["state"].update({9: {}})),
            r"state\[9\] of the checkpoint belongs to none",
        ),
        (
            checkpoints.from_torchao,
            changed(peers.of_torchao(VALUES), lambda s: s["state"][3].update(exp_avg=3.0)),
            "parameter 'odd': 'exp_avg' is a float",
        ),
        (
            checkpoints.from_bitsandbytes,
            peers.of_torchao(VALUES),
            "parameter 'one.weight': its state has 'step', 'exp_avg', 'exp_avg_sq', expected 'state1'",
        ),
        (checkpoints.from_bitsandbytes, peers.of_bitsandbytes([(m,) for m, _ in VALUES]), "keeps 1 tensors .* another"),
        (
            checkpoints.from_bitsandbytes,
            peers.of_bitsandbytes(VALUES, block=512),
            "parameter 'one.weight': 'state1' has 13 scales for 6400 elements, expected one for 256 or 2048",
        ),
        (
            checkpoints.from_bitsandbytes,
            changed(peers.of_bitsandbytes(VALUES, wrapped=False), lambda s: s["state"][0].pop("qmap2")),
            "'state2' is in 8 bits, but 'qmap2' is missing",
        ),
        (
            checkpoints.from_apex,
            changed(peers.of_fused_adam(VALUES), lambda s: s["param_groups"][0].update(bias_correction=False)),
            "group 0 of the checkpoint has bias_correction=False",
        ),
        (
            checkpoints.from_apex,
            {"state": {"step": 3, "buckets": []}, "param_groups": peers.of_fused_adam(VALUES)["param_groups"]},
            "belongs to none of its parameters: this layout is not known; gather",
        ),
        (
            checkpoints.from_apex,
            changed(peers.of_fused_adam(VALUES), lambda s: s["state"][0].update(fragments=torch.ones(3))),
            "parameter 'one.weight': the checkpoint has 'fragments', which AdamW does not keep",
        ),
        (
            checkpoints.from_apex,
            peers.of_fp16_optimizer(VALUES, masters()[:3]),
            "fp32_from_fp16 has 3 masters for group 0, which has 4 parameters of 16 bits",
        ),
        (checkpoints.from_deepspeed, {"state": {}}, "from_deepspeed takes the folder of a universal checkpoint"),
        (checkpoints.from_deepspeed, [{"fp32_flat_groups": []}], "process 0 has saved holds 'fp32_flat_groups'"),
        (
            checkpoints.from_deepspeed,
            peers.zero_ranks(NAMES, VALUES, masters())[:1],
            "elements in what 1 processes have saved, expected",
        ),
        (
            checkpoints.from_deepspeed,
            peers.zero_ranks(["other", *NAMES[1:]], VALUES, masters()),
            "has no state of parameter 'one.weight'; it has odd, one.bias, two.weight",
        ),
        (checkpoints.from_deepspeed, "/nowhere", "/nowhere has no folder for a parameter"),
    ],
)
def test_layouts_that_are_not_known(take, source, message):
    optimizer, _ = make()
    with pytest.raises(ValueError, match=message):
        take(source, optimizer)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("take", "make_optimizer", "error", "message"),
    [
        (
            checkpoints.from_torchao,
            lambda p: torch.optim.AdamW(p),
            TypeError,
            "from_torchao takes an optimizer of optim_ext",
        ),
        (checkpoints.from_bitsandbytes, lambda p: optim.NAdam(p), TypeError, "bitsandbytes has no NAdam"),
        (checkpoints.from_deepspeed, lambda p: optim.AdamW(p), ValueError, "group 0 of this AdamW has no names"),
    ],
)
def test_optimizers_that_take_no_such_state(take, make_optimizer, error, message):
    with pytest.raises(error, match=message):
        take(peers.of_fused_adam(VALUES), make_optimizer(make()[1]))


def test_masters_that_are_too_few():
    with pytest.raises(ValueError, match="masters has 2 tensors, expected one for each of 4 parameters"):
        checkpoints.from_apex(peers.of_fused_adam(VALUES), make()[0], masters=masters()[:2])


# --- with the programs themselves, where they are installed ---


def has(name):
    return importlib.util.find_spec(name) is not None


def train_others(optimizer, params, steps=3):
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()


def through_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.only_where(has("torchao"), reason="torchao is installed")
@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit", "AdamW4bit", "AdamWFp8"])
def test_the_real_torchao(name):
    import torchao.optim

    params = make()[1]
    theirs = getattr(torchao.optim, name)(params, lr=0.02)
    with torch.compiler.set_stance("force_eager"):
        train_others(theirs, params)
    ours, others = make(optim.AdamW if name.startswith("AdamW") else optim.Adam, param_precision="remainder")
    ours.load_state_dict(checkpoints.from_torchao(through_file(theirs.state_dict()), ours))
    for p, q in zip(params, others, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            value = theirs.state[p][key]
            value = value.dequantize(torch.float32) if hasattr(value, "codes") else value.float()
            assert torch.equal(ours.state[q][key], value), key
        assert float(ours.state[q]["step"]) == 3.0
    train_others(ours, others)


@pytest.mark.only_where(has("bitsandbytes"), reason="bitsandbytes is installed")
@pytest.mark.parametrize(
    ("name", "cls", "keys"),
    [
        ("AdamW8bit", optim.AdamW, ("exp_avg", "exp_avg_sq")),
        ("Adam32bit", optim.Adam, ("exp_avg", "exp_avg_sq")),
        ("Lion8bit", optim.Lion, ("exp_avg",)),
        ("SGD8bit", optim.SGD, ("momentum_buffer",)),
        ("RMSprop8bit", optim.RMSprop, ("square_avg",)),
        ("Adagrad8bit", optim.Adagrad, ("sum",)),
    ],
)
def test_the_real_bitsandbytes(name, cls, keys):
    import bitsandbytes
    from bitsandbytes import functional

    params = make(dtype=torch.float32)[1]
    momentum = {"momentum": 0.9} if cls is optim.SGD else {}
    theirs = getattr(bitsandbytes.optim, name)(params, lr=0.02, **momentum)
    train_others(theirs, params)
    ours, others = make(cls, dtype=torch.float32, **momentum)
    ours.load_state_dict(checkpoints.from_bitsandbytes(through_file(theirs.state_dict()), ours))
    for p, q in zip(params, others, strict=True):
        for number, key in enumerate(keys, 1):
            entry = theirs.state[p]
            value = entry[f"state{number}"]
            if value.dtype is torch.uint8:
                value = functional.dequantize_blockwise(
                    value, absmax=entry[f"absmax{number}"], code=entry[f"qmap{number}"], blocksize=256
                )
            assert torch.equal(ours.state[q][key], value), key
    train_others(ours, others)


# Two processes, as two parts of one flat tensor are what has to be put together. What DeepSpeed compiles for processes of
# one machine it can do without.
DEEPSPEED = """
import os, sys
rank, port, folder = sys.argv[1:]
os.environ.update(DS_ACCELERATOR="cpu", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
import torch, deepspeed, deepspeed.comm.torch
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.Linear(7, 3))
config = dict(train_batch_size=4, train_micro_batch_size_per_gpu=2, bf16={"enabled": True},
              zero_optimization={"stage": 2}, zero_allow_untested_optimizer=True)
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), config=config)
for step in range(3):
    torch.manual_seed(2 * step + int(rank))
    engine.backward(engine(torch.randn(2, 10).bfloat16()).float().square().mean())
    engine.step()
engine.save_checkpoint(folder, tag="saved")
right = {
    name: {"param": p.detach(), "fp32": safe_get_full_fp32_param(p)}
    | {key: safe_get_full_optimizer_state(p, key) for key in ("exp_avg", "exp_avg_sq")}
    for name, p in engine.module.named_parameters()
}
if rank == "0":
    torch.save(right, f"{folder}/right.pt")
    from deepspeed.checkpoint import ds_to_universal
    sys.argv[1:] = ["--input_folder", f"{folder}/saved", "--output_folder", f"{folder}/universal", "--inject_missing_state",
                    "--num_extract_workers", "1", "--num_merge_workers", "1"]
    ds_to_universal.main(ds_to_universal.parse_arguments())
"""


@pytest.mark.only_where(has("deepspeed"), reason="DeepSpeed is installed")
def test_the_real_deepspeed(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    commands = [[sys.executable, "-c", DEEPSPEED, str(rank), port, str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for line in commands]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    files = sorted((tmp_path / "saved").glob("*zero_pp_rank_*_optim_states.pt"))
    right = torch.load(tmp_path / "right.pt")
    model = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.Linear(7, 3)).bfloat16()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(right[name]["param"])
    for source in ([torch.load(file, weights_only=False) for file in files], tmp_path / "universal"):
        optimizer = optim.AdamW(model.named_parameters(), param_precision="master")
        optimizer.load_state_dict(checkpoints.from_deepspeed(source, optimizer))
        for name, p in model.named_parameters():
            found = optimizer.state[p]
            assert float(found["step"]) == 3.0
            for key, own in (("fp32", "master_param"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
                assert torch.equal(found[own], right[name][key].view_as(p)), (name, key)
