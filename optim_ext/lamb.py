"""LAMB, which torch.optim does not have."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim_ext._beyond_torch import BeyondTorch, check_betas, check_not_negative, check_one_element
from optim_ext._constructor import AddedOptions


class LAMB(BeyondTorch):
    r"""LAMB: Adam's direction, scaled for each parameter tensor so that its step has the length of the tensor itself.

    With Adam's bias-corrected moments :math:`\hat m, \hat v` and a parameter tensor :math:`\theta`:

    .. math::
        u_t = \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} + \lambda \theta_{t-1}, \quad
        \theta_t = \theta_{t-1} - \gamma \frac{\|\theta_{t-1}\|}{\|u_t\|} u_t

    The ratio is 1 where one of the two norms is zero. From "Large Batch Optimization for Deep Learning: Training BERT in
    76 minutes" (You et al. 2020, arXiv:1904.00962, algorithm 2, with the identity for its scaling function).

    State of a parameter: ``step``, one number on the CPU (on the parameter's GPU once a step may be skipped there);
    ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape and dtype. A step needs memory for the updates of a group besides. Gradients must be dense; parameters are of floating
    point or complex type (a complex one counts as two real ones).

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate, a number or a tensor with one element (default: 1e-3).
        betas: weights of the running averages of the gradient and of its square (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-6).
        weight_decay: weight decay, part of what is scaled (default: 0).
        maximize: climb the objective instead of descending it (default: False).

    Raises:
        ValueError: an option is out of its range.
    """

    _op = "lamb_"
    _measures_tensors = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **added: Unpack[AddedOptions],
    ) -> None:
        check_one_element(lr)
        check_not_negative(learning_rate=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **added)
