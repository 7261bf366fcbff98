"""torch's own schedulers, so that ``from optim_ext.lr_scheduler import ...`` works as it does for ``torch.optim``."""

import sys

from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import *  # noqa: F403

sys.modules[__name__] = lr_scheduler  # with its private names, which older scripts import
