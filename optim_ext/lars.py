"""LARS, which torch.optim does not have."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim_ext._beyond_torch import BeyondTorch, check_not_negative, check_one_element
from optim_ext._constructor import AddedOptions


class LARS(BeyondTorch):
    r"""LARS: momentum SGD with a learning rate for each parameter tensor, in proportion to its norm.

    With gradient :math:`g`, momentum buffer :math:`b` and a parameter tensor :math:`\theta`:

    .. math::
        \eta_t = \frac{\eta \|\theta_{t-1}\|}{\|g_t\| + \lambda \|\theta_{t-1}\| + \epsilon}, \quad
        b_t = \mu b_{t-1} + \eta_t (g_t + \lambda \theta_{t-1}), \quad
        \theta_t = \theta_{t-1} - \gamma b_t

    The local rate is 1 where one of the two norms is zero. From "Large Batch Training of Convolutional Networks" (You,
    Gitman & Ginsburg 2017, arXiv:1708.03888, algorithm 1); as in :class:`torch.optim.SGD` the learning rate stays out of
    the momentum buffer, so a schedule acts at once.

    State of a parameter: ``momentum_buffer``, of the parameter's shape and dtype. Gradients must be dense; parameters are
    of floating point or complex type (a complex one counts as two real ones).

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate, a number or a tensor with one element (default: 1e-3).
        momentum: momentum factor (default: 0.9).
        weight_decay: weight decay (default: 0).
        trust_coefficient: the fraction of its norm by which a tensor moves at learning rate 1 (default: 1e-3).
        eps: added to the denominator (default: 1e-8).
        nesterov: use Nesterov momentum (default: False).
        maximize: climb the objective instead of descending it (default: False).

    Raises:
        ValueError: an option is out of its range.
    """

    _op = "lars_"
    _measures_tensors = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        *,
        nesterov: bool = False,
        maximize: bool = False,
        **added: Unpack[AddedOptions],
    ) -> None:
        check_one_element(lr)
        check_not_negative(
            learning_rate=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps
        )
        if nesterov and momentum <= 0:
            raise ValueError("Nesterov momentum requires a momentum")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **added)
