"""An embedding for verification: a point on the sphere for each spectrogram, near to others of the same user.

    z = f(x) / |f(x)|,   d^2(a, b) = |z_a - z_b|^2 = 2 - 2 cos(a, b)

f has the body of the judge of identity, with weights of its own. What pulls and pushes is one of

    contrastive   mean of y d^2 + (1 - y) max(0, m - d)^2 over pairs, y = 1 for two of the same user   (Siamese)
    triplet       mean of max(0, d^2(a, p) - d^2(a, n) + m) over pairs (a, p), n a semi-hard negative
    arcface       cross entropy of s cos(theta_j + m [j = y]), theta_j the angle to user j's direction

Each is a few lines, and so they stand here: pytorch-metric-learning would bring scikit-learn with it, and its accuracy
calculator asks for faiss.
"""

import math
from functools import partial

import numpy as np
import torch as th
import torch.nn.functional as F
from torch import nn

from .user_classifier import CHUNK, UserClassifier, learn, to_input

DEFAULT_LOSS = "arcface"
USERS_IN_BATCH = 8  # of a balanced batch: so many users, and as many images of each as fill it
TINY = 1e-6  # below it a squared distance or sine counts as this, whose root has a finite slope


class Embedding(nn.Module):
    """Images (N, 3, 64, 64) in [-1, 1] to unit vectors (N, 64)."""

    def __init__(self, num_users: int):
        super().__init__()
        self.net = UserClassifier(num_users)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.normalize(self.net.embed(x))

    @property
    def directions(self) -> th.Tensor:
        """The direction of every user (num_users, 64), which ArcFace alone learns."""
        return self.net.head.weight

    @th.inference_mode()
    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Unit vectors (N, 64) float32 of uint8 images (N, H, W, 3) of any size."""
        self.eval()
        parts = (pixels[i : i + CHUNK] for i in range(0, len(pixels), CHUNK))
        return np.concatenate([np.zeros((0, 64), np.float32), *(self(to_input(part)).numpy() for part in parts)])

    def fingerprint(self) -> str:
        """16 hex digits that name these weights, and so this space."""
        return self.net.fingerprint()


def train_embedding(
    pixels: np.ndarray,
    users: np.ndarray,
    num_users: int,
    *,
    loss: str = DEFAULT_LOSS,
    seed: int = 0,
    epochs: int = 20,
    progress: bool = False,
) -> Embedding:
    """Learn to tell users apart from real images; the same seed gives the same embedding on the same machine.

    Args:
        pixels: uint8 (N, H, W, 3); users: int (N,) in [0, num_users).
        loss: one of LOSSES.
    """
    value, batches = LOSSES[loss]
    return learn(
        partial(Embedding, num_users),
        value,
        pixels,
        users,
        seed=seed,
        epochs=epochs,
        progress=f"the embedding learns ({loss})" if progress else None,
        batches=batches,
    )


# ---- losses ----------------------------------------------------------------------------------------------------------


def contrastive_loss(z: th.Tensor, users: th.Tensor, *, margin: float = 2**0.5) -> th.Tensor:
    """y d^2 + (1 - y) max(0, m - d)^2, the mean over all pairs of unit vectors z (B, d) of users (B,).

    Two directions that have nothing to do with each other are sqrt 2 apart, and so is the margin.

    Source:
        Hadsell et al. 2006, eq. 4, without its halves.
    """
    i, j = th.triu_indices(len(z), len(z), offset=1)
    squares = squared_distances(z)[i, j]
    apart = F.relu(margin - squares.clamp(min=TINY).sqrt()) ** 2
    return th.where(users[i] == users[j], squares, apart).mean()


def triplet_loss(z: th.Tensor, users: th.Tensor, *, margin: float = 0.4) -> th.Tensor:
    """max(0, d^2(a, p) - d^2(a, n) + m), the mean over the triplets that `semi_hard` finds; 0 where it finds none.

    Source:
        Schroff et al. 2015, eq. 3.
    """
    squares = squared_distances(z)
    anchor, positive, negative = semi_hard(squares.detach(), users)
    losses = F.relu(squares[anchor, positive] - squares[anchor, negative] + margin)
    return losses.sum() / max(1, len(losses))


def semi_hard(squares: th.Tensor, users: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Indices (anchor, positive, negative), one triplet for each ordered pair of images of one user.

    The negative is the nearest one that is farther from the anchor than the positive is; where none is, the farthest.
    Nearer ones pull everything into one point early in training.

    Args:
        squares: (B, B) squared distances; users: (B,).
    """
    same = users[:, None] == users
    anchor, positive = (same & ~th.eye(len(users), dtype=th.bool)).nonzero(as_tuple=True)
    rivals = squares[anchor].masked_fill(same[anchor], math.nan)  # (pairs, B)
    farther = rivals > squares[anchor, positive, None]
    nearest = rivals.masked_fill(~farther, math.inf).argmin(dim=1)
    farthest = rivals.nan_to_num(-math.inf).argmax(dim=1)
    negative = th.where(farther.any(dim=1), nearest, farthest)
    has_rival = ~same[anchor].all(dim=1)
    return anchor[has_rival], positive[has_rival], negative[has_rival]


def arcface_loss(
    z: th.Tensor, users: th.Tensor, directions: th.Tensor, *, scale: float = 30.0, margin: float = 0.3
) -> th.Tensor:
    """Cross entropy of s cos(theta_j), where the angle to the right user's direction counts m more than it is.

        cos(theta + m) = cos theta cos m - sin theta sin m

    Beyond theta = pi - m, where that would rise again, cos theta + cos m - 1 goes on falling from -1.

    Args:
        z: unit vectors (B, d); users: (B,); directions: (num_users, d) of any length.
    Source:
        Deng et al. 2019, eq. 3 (another continuation: theirs has a step).
    """
    cosines = z @ F.normalize(directions).T  # (B, num_users)
    right = cosines.gather(1, users[:, None])
    sines = (1 - right**2).clamp(min=TINY).sqrt()
    turned = right * math.cos(margin) - sines * math.sin(margin)
    turned = th.where(right > -math.cos(margin), turned, right + math.cos(margin) - 1)
    return F.cross_entropy(scale * cosines.scatter(1, users[:, None], turned), users)


def squared_distances(z: th.Tensor) -> th.Tensor:
    """|z_i - z_j|^2 of unit vectors (B, d): (B, B)."""
    return (2 - 2 * z @ z.T).clamp(min=0)


def balanced(users: th.Tensor, size: int, steps: int):
    """`steps` batches of about `size` indices: some users, drawn anew each time, and equally many images of each."""
    places = [th.nonzero(users == user)[:, 0] for user in users.unique()]
    some = min(USERS_IN_BATCH, len(places))
    each = max(2, size // some)
    for _ in range(steps):
        drawn = [places[k] for k in th.randperm(len(places))[:some]]
        yield th.cat([own[th.randperm(len(own))[:each]] for own in drawn])


LOSSES = {  # name -> (loss of a model and a batch, how batches are drawn; None: one shuffled pass after another)
    "contrastive": (lambda model, x, y: contrastive_loss(model(x), y), balanced),
    "triplet": (lambda model, x, y: triplet_loss(model(x), y), balanced),
    "arcface": (lambda model, x, y: arcface_loss(model(x), y, model.directions), None),
}
