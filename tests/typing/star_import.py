"""The names that ``from optim_ext import *`` brings, as a user's type checker sees them: ours, not torch's."""

import torch

from optim_ext import *  # noqa: F403

optimizer = AdamW([torch.zeros(1)], lr=1e-3)  # noqa: F405
optimizer.clip_grad_norm(1.0)
lr_scheduler.StepLR(optimizer, 1)  # noqa: F405
print(explain(optimizer), swa_utils.AveragedModel, Lion, Optimizer)  # noqa: F405
