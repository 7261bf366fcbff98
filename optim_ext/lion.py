"""Lion, which torch.optim does not have."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from optim_ext._beyond_torch import BeyondTorch, check_betas, check_not_negative, check_one_element
from optim_ext._constructor import AddedOptions


class Lion(BeyondTorch):
    r"""Lion: the sign of an interpolated momentum, with decoupled weight decay.

    With gradient :math:`g`, moving average :math:`m` and parameter :math:`\theta`, element by element:

    .. math::
        u_t = \mathrm{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \quad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t, \quad
        \theta_t = \theta_{t-1} - \gamma (u_t + \lambda \theta_{t-1})

    Every element moves by the learning rate, so use one 3 to 10 times smaller than AdamW's, and a weight decay larger by
    as much. From "Symbolic Discovery of Optimization Algorithms" (Chen et al. 2023, arXiv:2302.06675).

    State of a parameter: ``exp_avg``, of the parameter's shape and dtype. Gradients must be dense; parameters are of
    floating point or complex type (a complex one counts as two real ones).

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate, a number or a tensor with one element (default: 1e-4).
        betas: weights of the moving average in the update, and in the average itself (default: (0.9, 0.99)).
        weight_decay: decoupled weight decay, multiplied by the learning rate (default: 0).
        maximize: climb the objective instead of descending it (default: False).

    Raises:
        ValueError: an option is out of its range.
    """

    _op = "lion_"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **added: Unpack[AddedOptions],
    ) -> None:
        check_one_element(lr)
        check_not_negative(learning_rate=lr, weight_decay=weight_decay)
        check_betas(betas)
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}, **added
        )
