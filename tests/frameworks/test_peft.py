"""LoRA of peft: most of the model is frozen; what is trained are small matrices, half of them zero at first."""

import pytest
import torch
from beside import PACKAGES, Run, assert_alike, assert_near, assert_resumed, both, four_ways, values
from language import llama, text
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer

import optim_ext
from optim_ext import swa_utils

MATRICES = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def adapted(saved=None):
    torch.manual_seed(4)
    if saved is not None:
        return PeftModel.from_pretrained(llama(), saved, is_trainable=True)
    return get_peft_model(llama(), LoraConfig(**MATRICES))


def adamw(package, model, **options):
    return package.AdamW(model.parameters(), lr=0.02, **options)


def lora_plus(package, model, **options):
    """Four groups with rates of their own."""
    return create_loraplus_optimizer(model, package.AdamW, lr=0.005, loraplus_lr_ratio=8, weight_decay=0.01, **options)


def train(package, make=adamw, steps=range(8), save_to=None, resume_from=None, prepare=None, **options):
    model = adapted(resume_from)
    optimizer = make(package, model, **options)
    if resume_from is not None:
        optimizer.load_state_dict(torch.load(resume_from / "optimizer.pt"))
    if prepare is not None:
        prepare(model, optimizer)
    frozen = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
    losses = []
    for step in steps:
        rows = text()[step::8]
        optimizer.zero_grad()
        loss = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert frozen and all(torch.equal(p, before) for p, before in frozen)
    if save_to is not None:
        model.save_pretrained(save_to)
        torch.save(optimizer.state_dict(), save_to / "optimizer.pt")
    return Run(losses, values(p for p in model.parameters() if p.requires_grad), optimizer)


@pytest.mark.parametrize("make", [adamw, lora_plus])
@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_losses_are_torchs(make, options):
    assert_alike(*both(train, make, **options))


@four_ways
def test_checkpoints(writer, reader, tmp_path):
    train(PACKAGES[writer], steps=range(4), save_to=tmp_path)
    resumed = train(PACKAGES[reader], steps=range(4, 8), resume_from=tmp_path)
    assert_resumed(resumed, train(PACKAGES[reader]), writer == reader)


def test_an_average_of_a_model_that_is_mostly_frozen():
    averages = []

    def in_the_step(model, optimizer):
        averages.append(swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)))
        optimizer.average_into(averages[0])

    def after_it(model, optimizer):
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        averages.append(torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average))
        optimizer.register_step_post_hook(lambda *_: averages[1].update_parameters(model))

    assert_alike(train(optim_ext, prepare=in_the_step), train(torch.optim, prepare=after_it))
    assert_near(*(average.module.parameters() for average in averages))
