"""What autoencoders have in common: a diagonal Gaussian over latents."""

import torch as th

LOGVAR_RANGE = (-30.0, 20.0)  # beyond this a variance is 0 or infinite in float32


class Posterior:
    """q(z | x) = N(mean, e^logvar), element by element.

    Args:
        moments: (N, 2C, ...): mean, then log-variance, which is clamped to [-30, 20].
    """

    def __init__(self, moments: th.Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> th.Tensor:
        return th.exp(0.5 * self.logvar)

    def sample(self, noise: th.Tensor | None = None) -> th.Tensor:
        """mean + std noise; the noise is drawn if not given."""
        return self.mean + self.std * (th.randn_like(self.mean) if noise is None else noise)

    def mode(self) -> th.Tensor:
        """The mean."""
        return self.mean

    def kl(self) -> th.Tensor:
        """KL(q || N(0, I)) in nats, summed over all but the first dimension: (N,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)
