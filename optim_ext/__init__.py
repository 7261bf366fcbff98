"""The optimizers of ``torch.optim`` as native kernels: ``import optim_ext as optim`` and keep everything else.

The optimizers are subclasses of torch's classes of the same name whose ``step()`` runs natively; every other public name is
torch's own. ``LAMB``, ``LARS`` and ``Lion`` are not in torch.
"""

from typing import TYPE_CHECKING

import torch.optim
from torch.optim import Optimizer as Optimizer
from torch.optim import lr_scheduler as lr_scheduler

if TYPE_CHECKING:  # to type checkers the first definition of a name counts, so these must not be torch's classes
    from torch.optim import swap_in_optimizer_params_and_state as swap_in_optimizer_params_and_state
else:
    from torch.optim import *  # noqa: F403

from optim_ext import _fakes  # noqa: F401
from optim_ext import swa_utils as swa_utils
from optim_ext import utils as utils
from optim_ext._explain import GroupReport, explain
from optim_ext._grad_control import GradPolicy, GroupNorms, NonFinite
from optim_ext._load import build_info
from optim_ext._memory import GroupBytes, MemoryRow, MemoryTable, memory
from optim_ext._patch import TorchPatch, patch_torch
from optim_ext._rules import RuleError as RuleError
from optim_ext._rules import rule as rule
from optim_ext._rules.compiler import include_paths
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

__version__: str = build_info()["version"]

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "GradPolicy",
    "GroupBytes",
    "GroupNorms",
    "GroupReport",
    "Lion",
    "MemoryRow",
    "MemoryTable",
    "Muon",
    "NAdam",
    "NonFinite",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "RuleError",
    "SparseAdam",
    "TorchPatch",
    "build_info",
    "explain",
    "include_paths",
    "lr_scheduler",
    "memory",
    "patch_torch",
    "rule",
    "swa_utils",
]
# What this version of torch has besides.
__all__ += [name for name in torch.optim.__all__ if name not in __all__]
