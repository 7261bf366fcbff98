"""The optimizers of ``torch.optim`` as native kernels: ``import optim_ext as optim`` and keep everything else.

The optimizers are subclasses of torch's classes of the same name whose ``step()`` runs natively; every other public name is
torch's own. ``LAMB``, ``LARS`` and ``Lion`` are not in torch.
"""

import torch.optim
from torch.optim import *  # noqa: F403
from torch.optim import (  # noqa: F401
    Optimizer,
    lr_scheduler,
)

from optim_ext import _fakes, utils  # noqa: F401
from optim_ext import swa_utils as swa_utils  # type: ignore[no-redef]
from optim_ext._explain import GroupReport, explain
from optim_ext._load import build_info
from optim_ext.adadelta import Adadelta as Adadelta
from optim_ext.adafactor import Adafactor as Adafactor
from optim_ext.adagrad import Adagrad as Adagrad
from optim_ext.adam import Adam as Adam
from optim_ext.adamax import Adamax as Adamax
from optim_ext.adamw import AdamW as AdamW
from optim_ext.asgd import ASGD as ASGD
from optim_ext.lamb import LAMB as LAMB
from optim_ext.lars import LARS as LARS
from optim_ext.lbfgs import LBFGS as LBFGS
from optim_ext.lion import Lion as Lion
from optim_ext.muon import Muon as Muon
from optim_ext.nadam import NAdam as NAdam
from optim_ext.radam import RAdam as RAdam
from optim_ext.rmsprop import RMSprop as RMSprop
from optim_ext.rprop import Rprop as Rprop
from optim_ext.sgd import SGD as SGD
from optim_ext.sparse_adam import SparseAdam as SparseAdam

__version__ = "0.1.0"

__all__ = [name for name in dir(torch.optim) if not name.startswith("_") and name in globals()]
__all__ += ["LAMB", "LARS", "GroupReport", "Lion", "build_info", "explain", "utils"]
