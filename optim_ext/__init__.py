"""The optimizers of ``torch.optim`` as native kernels: ``import optim_ext as optim`` and keep everything else.

``SGD``, ``Adam``, ``AdamW``, ``RMSprop`` and ``Adagrad`` are subclasses of torch's classes of the same name whose ``step()``
runs natively; every other public name is torch's own.
"""

import torch.optim
from torch.optim import *  # noqa: F403
from torch.optim import (  # noqa: F401
    ASGD,
    Adadelta,
    Adafactor,
    Adamax,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    Rprop,
    SparseAdam,
    lr_scheduler,
    swa_utils,
)

from optim_ext import _fakes  # noqa: F401
from optim_ext._explain import GroupReport, explain
from optim_ext._load import build_info
from optim_ext.adagrad import Adagrad as Adagrad
from optim_ext.adam import Adam as Adam
from optim_ext.adamw import AdamW as AdamW
from optim_ext.lbfgs import LBFGS as LBFGS
from optim_ext.rmsprop import RMSprop as RMSprop
from optim_ext.sgd import SGD as SGD

__version__ = "0.1.0"

__all__ = [name for name in dir(torch.optim) if not name.startswith("_") and name in globals()]
__all__ += ["GroupReport", "build_info", "explain"]
