"""torch's own base class, so that ``from optim_ext.optimizer import Optimizer`` works as it does for ``torch.optim``."""

import sys

from torch.optim import optimizer
from torch.optim.optimizer import *  # noqa: F403

sys.modules[__name__] = optimizer
