"""A Llama of two layers, made here, and text for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def text(count: int = 32, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Sentences that count up, each from a number of its own."""
    starts = torch.randint(32, (count, 1), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in (starts + torch.arange(length)) % 32]
