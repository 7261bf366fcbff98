"""Adafactor, torch's own but for parameters without elements, where torch divides zero by zero."""

import torch


class Adafactor(torch.optim.Adafactor):
    def _init_group(self, group, *lists):
        """Makes state and gathers; what has no element is then counted and left out."""
        has_complex = super()._init_group(group, *lists)
        params, *_, state_steps = lists
        for index in reversed(range(len(params))):
            if params[index].numel() == 0:
                state_steps[index] += 1
                for one in lists:
                    del one[index]
        return has_complex
