"""Stable-Baselines3: a policy makes its optimizer of a class and keywords; algorithms save and load it."""

import gymnasium
import numpy as np
import pytest
import torch
from beside import PACKAGES, assert_native, assert_near, four_ways, values
from stable_baselines3 import A2C, PPO

import optim_ext


class Guess(gymnasium.Env):
    """Rewards the action that the sign of what is seen tells."""

    observation_space = gymnasium.spaces.Box(-3, 3, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def look(self):
        self.seen = self.np_random.normal(size=2).clip(-3, 3).astype(np.float32)
        return self.seen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 8
        return self.look(), {}

    def step(self, action):
        reward = float(action == int(self.seen[0] > 0))
        self.left -= 1
        return self.look(), reward, self.left == 0, False, {}


ALGORITHMS = {
    "A2C": (A2C, {"n_steps": 8, "use_rms_prop": False}),
    "PPO": (PPO, {"n_steps": 32, "batch_size": 16, "n_epochs": 2}),
}


def made(package, name="PPO", max_grad_norm=0.5, **options):
    algorithm, own = ALGORITHMS[name]
    policy = {"net_arch": [8], "optimizer_class": package.AdamW, "optimizer_kwargs": options}
    common = {"learning_rate": 0.01, "seed": 3, "device": "cpu", "max_grad_norm": max_grad_norm}
    return algorithm("MlpPolicy", Guess(), policy_kwargs=policy, **common, **own)


def learned(model, steps=128, **options):
    return values(model.learn(steps, **options).policy.parameters())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_policies_are_torchs(name):
    """The actions are drawn from the policy: were it another one, so would be what is seen and learned."""
    model = made(optim_ext, name)
    start = values(model.policy.parameters())
    ours = learned(model)
    assert_native(model.policy.optimizer)
    assert_near(ours, learned(made(torch.optim, name)))
    assert not torch.equal(start[0], ours[0])


def test_the_constructors_norm_is_the_algorithms_clip():
    """Which comes first, and cannot be switched off but by a large number."""
    model = made(optim_ext, max_grad_norm=1e9, max_norm=0.05)
    assert_near(learned(model), learned(made(torch.optim, max_grad_norm=0.05)))
    assert model.policy.optimizer.grad_policy.max_norm == 0.05


@four_ways
def test_checkpoints(writer, reader, tmp_path):
    """The file holds the class of the optimizer; another one is chosen by custom_objects."""
    file = tmp_path / "saved.zip"
    first = made(PACKAGES[writer])
    first.learn(64)
    first.save(file)
    policy = {"net_arch": [8], "optimizer_class": PACKAGES[reader].AdamW, "optimizer_kwargs": {}}
    second = PPO.load(file, Guess(), device="cpu", custom_objects={"policy_kwargs": policy})
    assert type(second.policy.optimizer) is PACKAGES[reader].AdamW
    torch_again = PPO.load(
        file, Guess(), device="cpu", custom_objects={"policy_kwargs": policy | {"optimizer_class": torch.optim.AdamW}}
    )
    both = []
    for model in (second, torch_again):
        model.set_random_seed(5)
        both.append(learned(model, 64, reset_num_timesteps=False))
    assert_near(*both)
