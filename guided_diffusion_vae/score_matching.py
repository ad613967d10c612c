"""What a classifier's gradient is for: with it, a network that knows no labels must predict the noise better.

Cross-entropy asks how likely a label is at x_t, guidance how that changes with x_t, which nothing has taught: such a
gradient points to what only this classifier sees. The true one is what the label adds to the score, and it minimises

    w |eps(x_t) - sigma grad log p(y | x_t) - noise|^2,      w = min(1 / alpha^2, 100),

the network's own loss with guidance of scale 1. The weight makes it the error of x_start deep in noise, where persons
are decided, up to a bound.

Source: Chao et al. 2022 (denoising likelihood score matching), whose weight is sigma^2.
"""

from collections.abc import Callable

import torch as th

from .flow_matching import FlowMatching
from .nn import mean_flat

LARGEST_WEIGHT = 100.0


class GuidedNoise:
    """The loss of a network under guidance.

    Args:
        model: (x_t, t) -> what the process says; it learns nothing.
        process: that of the model, Gaussian or a flow.
    """

    def __init__(self, model: Callable[..., th.Tensor], process):
        self.model, self.process = model, process

    def errors(self, gradient, x_t, t, noise) -> tuple[th.Tensor, th.Tensor]:
        """Weighted mean squared errors of the noise, guided and unguided, each (N,).

        Args:
            gradient: (N, C, h, w) of the log-probability, by x_t; t: (N,) times of the process; noise: what is in x_t.
        """
        one = th.ones_like(x_t[:, :1, :1, :1])
        alpha, sigma = (self.process.q_sample(a, t, noise=b) for a, b in ((one, 0 * one), (0 * one, one)))
        with th.no_grad():
            error = self._noise(x_t, t) - noise
        w = (1 / alpha**2).clamp(max=LARGEST_WEIGHT)
        return mean_flat(w * (error - sigma * gradient) ** 2), mean_flat(w * error**2)

    def _noise(self, x_t, t):
        process = self.process
        if isinstance(process, FlowMatching):
            out = self.model(x_t, t * process.time_scale)
            return process.convert(out, x_t, t, source=process.prediction, target="noise")
        guess = process.p_mean_variance(self.model, x_t, t, clip_denoised=False)["pred_xstart"]
        return process._predict_eps_from_xstart(x_t, t, guess)
