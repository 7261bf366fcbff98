"""State as other programs lay it out in their checkpoints, made by code: for tests without these programs."""

from types import SimpleNamespace

import torch
from lockstep import random


class FewBits:
    """What torchao keeps state in: codes of the tensor's shape, a scale for each block, a table of values."""

    def __init__(self, value, block=256):
        self.codes, self.scale, self.qmap = coded(value, block)
        self.shape, self.block = value.shape, block

    def dequantize(self, output_dtype=None):
        return decoded(self.codes, self.scale, self.qmap, self.block).to(output_dtype)


def coded(value, block):
    """Codes, scales of blocks in memory order, and a table of 256 values between -1 and 1."""
    table = torch.linspace(-1, 1, 256) ** 3
    flat = value.float().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scale = padded.abs().amax(1)
    codes = (padded / scale[:, None].clamp(min=1e-30)).unsqueeze(-1).sub(table).abs().argmin(-1)
    return codes.flatten()[: len(flat)].view(value.shape).to(torch.uint8), scale, table


def decoded(codes, scale, table, block):
    flat = [table[code] * scale[index // block] for index, code in enumerate(codes.flatten().tolist())]
    return torch.stack(flat).view(codes.shape)


def moments(shapes, seed=0):
    """(exp_avg, exp_avg_sq) of each parameter."""
    return [
        (random(shape, torch.float32, seed + i), random(shape, torch.float32, seed + 50 + i).square())
        for i, shape in enumerate(shapes)
    ]


def of_torchao(values, step=3.0, lr=0.02):
    def kept(value):
        return FewBits(value) if value.numel() >= 4096 and value.numel() % 256 == 0 else value

    return {
        "state": {
            i: {"step": torch.tensor(step), "exp_avg": kept(m), "exp_avg_sq": kept(v)}
            for i, (m, v) in enumerate(values)
        },
        "param_groups": [
            {"lr": torch.tensor(lr), "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1, "amsgrad": False}
            | {"params": list(range(len(values)))}
        ],
    }


def of_bitsandbytes(values, block=256, wrapped=True, step=3, betas=(0.8, 0.95)):
    """``values``: state1 and, for some optimizers, state2 of each parameter; ``block``: None for one scale."""
    state = {}
    for i, several in enumerate(values):
        entry = {}
        for number, value in enumerate(several, 1):
            if value.numel() < 4096:
                entry[f"state{number}"] = value
                continue
            codes, scale, table = coded(value, block or value.numel())
            entry |= {f"state{number}": codes, f"qmap{number}": table}
            entry |= {f"absmax{number}": scale} if block else {f"max{number}": scale, f"new_max{number}": scale * 0}
        state[i] = {"step": step, **({"__bnb_optimizer_quant_state__": entry} if wrapped else entry)}
    group = {"lr": 0.02, "betas": betas, "eps": 1e-7, "weight_decay": 0.1, "alpha": 0.0, "t_alpha": None}
    return {"state": state, "param_groups": [{**group, "params": list(range(len(values)))}]}


def of_fused_adam(values, step=3):
    """apex.optimizers.FusedAdam, whose groups count."""
    group = {"lr": 0.02, "bias_correction": True, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1, "step": step}
    return {
        "state": {i: {"exp_avg": m, "exp_avg_sq": v} for i, (m, v) in enumerate(values)},
        "param_groups": [{**group, "params": list(range(len(values)))}],
    }


def of_fp16_optimizer(values, masters, step=3):
    """apex.fp16_utils.FP16_Optimizer around torch's AdamW."""
    inner = of_fused_adam(values)
    del inner["param_groups"][0]["step"]
    for entry in inner["state"].values():
        entry["step"] = torch.tensor(float(step))
    scaler = {"loss_scaler": SimpleNamespace(cur_scale=1.0), "dynamic_loss_scale": True, "overflow": False}
    return {**scaler, "optimizer_state_dict": inner, "fp32_from_fp16": [masters]}


def universal_checkpoint(folder, names, values, masters, step=3):
    """The folder that DeepSpeed's ds_to_universal writes."""
    for name, (m, v), master in zip(names, values, masters, strict=True):
        place = folder / "zero" / name
        place.mkdir(parents=True)
        for key, value in (("exp_avg", m), ("exp_avg_sq", v), ("fp32", master)):
            torch.save({"param": value, "cat_dim": 0}, place / f"{key}.pt")
        if step is not None:
            torch.save(torch.tensor(float(step)), place / "step.pt")
    return folder


def zero_ranks(names, values, masters, world=2, step=3):
    """What each of several processes saves in ZeRO's stages 1 and 2: its part of one flat tensor, and whose elements lie
    where in it."""
    flat = {
        key: torch.cat([value.flatten() for value in column])
        for key, column in zip(("exp_avg", "exp_avg_sq", "fp32"), (*zip(*values, strict=True), masters), strict=True)
    }
    size = -(-len(flat["fp32"]) // world)
    ranks = []
    for rank in range(world):
        first, places, begin = rank * size, {}, 0
        for name, master in zip(names, masters, strict=True):
            low, high = max(begin, first), min(begin + master.numel(), first + size)
            if low < high:
                places[name] = SimpleNamespace(start=low - first, numel=high - low)
            begin += master.numel()
        part = {
            key: torch.nn.functional.pad(value[first : first + size], (0, max(0, first + size - len(value))))
            for key, value in flat.items()
        }
        fp32 = part.pop("fp32")
        base = {"state": {0: {"step": step, **part}}, "param_groups": [{"lr": 0.02, "params": [0]}]}
        state = {"base_optimizer_state": base, "single_partition_of_fp32_groups": [fp32], "zero_stage": 2}
        ranks.append({"optimizer_state_dict": {**state, "param_slice_mappings": [places]}, "ds_version": "0.19.8"})
    return ranks
