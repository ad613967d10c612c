"""The judge of identity: a small network that learns from real spectrograms who is walking.

    features = norm(W |F_t conv(x)|),   logits = V relu(features)

The convolutions keep the Doppler rows; the magnitude of the Fourier transform F_t along time tells what recurs in each
row and how often (a cadence-velocity diagram), wherever in the gait cycle the picture starts. The features are the
space of FD_user and KID_user. To stay honest the judge learns from real training images alone, and is neither the
classifier that guides a generator nor its encoder.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch as th
import torch.nn.functional as F
from torch import nn

from guided_diffusion_vae.nn import shifted_in_time

from .progress import Progress

SIZE = 64  # side of the pictures that the judge sees
FREQUENCIES = 12  # of the 17 that 32 columns have: gait has its power in the lowest, noise in the rest
BATCH = 32
CHUNK = 256  # images at a time where nothing is learned
MIN_STEPS = 120  # however few the images


class Judgement(NamedTuple):
    """What the judge makes of N images: features (N, 64) float32 and the users (N,) it names."""

    features: np.ndarray
    users: np.ndarray


class UserClassifier(nn.Module):
    """116,000 parameters for 31 users; images (N, 3, 64, 64) in [-1, 1] to logits (N, num_users)."""

    def __init__(self, num_users: int, width: int = 32, maps: int = 8, num_features: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            *_conv(3, width // 2, 5, stride=2),
            *_conv(width // 2, width, 3, stride=(2, 1)),
            *_conv(width, width, 3),
            nn.Conv2d(width, maps, 1),
        )
        self.spectrum_norm = nn.BatchNorm2d(maps)
        self.features = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(maps * SIZE // 4 * FREQUENCIES, num_features),
            nn.BatchNorm1d(num_features),
        )
        self.head = nn.Linear(num_features, num_users)

    def embed(self, x: th.Tensor) -> th.Tensor:
        """Images (N, 3, 64, 64) in [-1, 1] to features (N, 64)."""
        h = self.body(x)  # (N, maps, 16, 32): Doppler, time
        spectrum = th.fft.rfft(h, norm="ortho")[..., :FREQUENCIES].abs()
        return self.features(self.spectrum_norm(th.log1p(spectrum)).flatten(1))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.head(F.relu(self.embed(x)))

    @th.inference_mode()
    def judge(self, pixels: np.ndarray) -> Judgement:
        """Features and named users of uint8 images (N, H, W, 3) of any size."""
        self.eval()
        blocks = (pixels[i : i + CHUNK] for i in range(0, max(1, len(pixels)), CHUNK))
        features = th.cat([self.embed(to_input(block)) for block in blocks])
        return Judgement(features.numpy(), self.head(F.relu(features)).argmax(dim=1).numpy())

    def fingerprint(self) -> str:
        """16 hex digits that name these weights, and so this feature space."""
        tensors = self.state_dict().values()
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def _conv(channels: int, out: int, kernel: int, stride: int | tuple[int, int] = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU()]


def to_input(pixels: np.ndarray) -> th.Tensor:
    """uint8 (N, H, W, 3) as (N, 3, 64, 64) in [-1, 1]; other sizes are averaged over the area of a pixel."""
    x = th.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    return x.contiguous() if x.shape[2:] == (SIZE, SIZE) else F.interpolate(x, size=(SIZE, SIZE), mode="area")


def train_user_classifier(
    pixels: np.ndarray,
    users: np.ndarray,
    num_users: int,
    *,
    seed: int = 0,
    epochs: int = 20,
    steps: int | None = None,
    augmented: bool = True,
    progress: bool | Progress = False,
) -> UserClassifier:
    """Learn who is walking from real images; the same seed gives the same judge on the same machine.

    Args:
        pixels: uint8 (N, H, W, 3); users: int (N,) in [0, num_users).
        steps, augmented, progress: see `learn`.
    """
    return learn(
        lambda: UserClassifier(num_users),
        lambda model, x, y: F.cross_entropy(model(x), y, label_smoothing=0.1),
        pixels,
        users,
        seed=seed,
        epochs=epochs,
        steps=steps,
        augmented=augmented,
        progress="the judge learns" if progress is True else progress or None,
    )


def learn(
    build,
    loss,
    pixels: np.ndarray,
    users: np.ndarray,
    *,
    seed: int,
    epochs: int,
    steps: int | None = None,
    augmented: bool = True,
    progress: str | Progress | None = None,
    batches=None,
):
    """The network that `build()` makes, with what it learned; the caller's random numbers stay as they are.

    Args:
        loss: (model, images (B, 3, 64, 64), users (B,)) -> what is to become small.
        steps: batches to learn from; None: what `steps_of` says.
        augmented: whether every batch goes through `augment`.
        progress: what to call it while it says how far it is, or a longer count that this is a part of; None: silent.
        batches: (users (N,), size, steps) -> as many batches of indices; by default one shuffled pass after another.
    """
    y = th.as_tensor(users, dtype=th.long)
    batch = min(BATCH, len(y))
    steps = steps or steps_of(epochs, len(y))
    with th.random.fork_rng(devices=[]):
        th.manual_seed(seed)
        model = build().to(memory_format=th.channels_last).train()
        optimiser = th.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = th.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
        chosen_ones = (batches or shuffled)(y, batch, steps)
        count = Progress(progress, steps) if isinstance(progress, str) else progress
        for chosen in count.of(chosen_ones) if count else chosen_ones:
            x = to_input(pixels[chosen.numpy()]).contiguous(memory_format=th.channels_last)  # a third faster on a CPU
            value = loss(model, augment(x) if augmented else x, y[chosen])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def steps_of(epochs: int, images: int) -> int:
    """Batches in so many passes over so many images; at least MIN_STEPS."""
    return max(MIN_STEPS, epochs * images // min(BATCH, images))


def augment(x: th.Tensor) -> th.Tensor:
    """Start elsewhere in the gait cycle, and with another receiver gain: neither says who walks. x: (N, 3, H, W)."""
    n, x = len(x), shifted_in_time(x)
    return x * (1 + 0.1 * th.randn(n, 1, 1, 1)) + 0.1 * th.randn(n, 1, 1, 1)


def shuffled(users: th.Tensor, size: int, steps: int):
    """`steps` batches of `size` indices: one shuffled pass after another."""
    order = th.empty(0, dtype=th.long)
    for _ in range(steps):
        if len(order) < size:
            order = th.cat([order, th.randperm(len(users))])
        yield order[:size]
        order = order[size:]
