"""AdamW as torch has it, fused, for weights of either layout."""

import torch as th
from torch import optim

from .channels_last import innermost


class AdamW(optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter 2019), also when it goes on from the state of one that was not.

    A weight, its gradient and its moments lie alike in memory, for torch's kernel walks through them in that order.
    """

    def __init__(self, params, **settings):
        super().__init__(params, fused=True, **settings)

    def load_state_dict(self, state_dict):
        """Take over a state from any device, of any layout; a run so resumed writes what one never interrupted does."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group |= {"fused": True, "foreach": None}
        for param, state in self.state.items():
            state["step"] = th.as_tensor(state["step"], dtype=th.float32, device=param.device)
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].stride() != param.stride():
                    state[name] = th.empty_like(param.detach()).copy_(state[name])

    def _init_group(self, group, *found):
        """Fill the lists of weights, gradients, moments and steps, as torch asks for them before each step.

        Its kernel first copies every gradient that is not contiguous, and then has no use for the copy: those with
        their channels innermost are shown to it in the order of their memory.
        """
        has_complex = super()._init_group(group, *found)
        for tensors in found:
            if isinstance(tensors, list):  # up to torch 2.6 there is a flag among them
                tensors[:] = [t.permute(0, 2, 3, 1) if innermost(t) else t for t in tensors]
        return has_complex
