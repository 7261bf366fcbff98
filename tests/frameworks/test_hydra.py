"""hydra: `_target_` names the class, and the rest of the node are its keywords."""

import torch
from beside import Run, assert_alike, batches, loss_of, network, values
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

CONFIG = """
optimizer:
  _target_: optim_ext.AdamW
  lr: 0.02
  betas: [0.9, 0.99]
  max_norm: 1.0
"""


def train(node):
    model = network()
    optimizer = instantiate(node, params=model.parameters())
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        if type(optimizer).__module__.startswith("torch."):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return Run(losses, values(model.parameters()), optimizer)


def test_a_class_and_its_options_come_from_a_file(tmp_path):
    (tmp_path / "training.yaml").write_text(CONFIG)
    with initialize_config_dir(str(tmp_path), version_base=None):
        ours = train(compose("training").optimizer)
        theirs = train(compose("training", ["optimizer._target_=torch.optim.AdamW", "~optimizer.max_norm"]).optimizer)
    assert ours.optimizer.grad_policy.max_norm == 1.0
    assert_alike(ours, theirs)


def test_partial_objects():
    make = instantiate({"_target_": "optim_ext.SGD", "_partial_": True, "lr": 0.1, "skip_nonfinite": True})
    assert make(network().parameters()).grad_policy.skip_nonfinite is True
