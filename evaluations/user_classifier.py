"""Who is walking? A small CNN that learns the users from real images, and a feature space that needs no download.

It never sees a generated image in training, so its accuracy on generated ones says whether identity survived; its
accuracy on real images of another session is the ceiling.
"""

from typing import NamedTuple

import numpy as np
import torch as th
import torch.nn as nn
import torch.nn.functional as F

SIZE = 64  # images are brought to this side, by area


class UserClassifier(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] -> logits (N, num_users)."""

    def __init__(self, num_users: int, width: int = 16, features: int = 96):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, features]
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in zip(widths, widths[1:], strict=False)
            )
        )
        rows = SIZE // 2 ** (len(widths) - 1)
        self.neck = nn.Sequential(nn.Dropout(0.2), nn.Linear(features * rows, features), nn.BatchNorm1d(features))
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.2), nn.Linear(features, num_users))

    def features(self, images):
        """(N, D): the last map averaged over time, not over Doppler, where speed shows, and narrowed."""
        if images.shape[-1] != SIZE:
            images = F.interpolate(images, (SIZE, SIZE), mode="area")
        return self.neck(self.body(images).mean(dim=3).flatten(1))

    def forward(self, images):
        return self.head(self.features(images))


class Judgement(NamedTuple):
    """Predicted labels (N,) and features (N, D)."""

    predicted: np.ndarray
    features: np.ndarray


def to_tensor(pixels: np.ndarray) -> th.Tensor:
    """uint8 (N, H, W, 3) as float (N, 3, H, W) in [-1, 1]."""
    return th.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(pixels: np.ndarray, labels: np.ndarray, *, num_users: int, epochs: int = 40, seed: int = 0):
    """A classifier trained on real images.

    Args:
        pixels: (N, H, W, 3) uint8; labels: (N,) int.
        seed: of weights, order and shifts; the same seed gives the same classifier.
    """
    with th.random.fork_rng(devices=[]):
        th.manual_seed(seed)
        model = UserClassifier(num_users)
        x, y = to_tensor(pixels), th.from_numpy(np.asarray(labels))
        x = F.interpolate(x, (SIZE, SIZE), mode="area") if x.shape[-1] != SIZE else x
        batch = min(64, len(x))
        steps = epochs * (len(x) // batch)
        opt = th.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = th.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for index in th.randperm(len(x))[: len(x) // batch * batch].split(batch):
                loss = F.cross_entropy(model(shifted_in_time(x[index])), y[index], label_smoothing=0.1)
                opt.zero_grad()
                loss.backward()
                opt.step()
                schedule.step()
        return model.eval()


def shifted_in_time(images: th.Tensor, most: int = 8) -> th.Tensor:
    """Images moved by up to `most` columns, edges repeated: another moment of the same walk (never mirrored)."""
    shift = int(th.randint(-most, most + 1, ()))
    padded = F.pad(images, (most, most, 0, 0), mode="replicate")
    return padded[..., most + shift : most + shift + images.shape[-1]]


@th.no_grad()
def judge(model: UserClassifier, pixels: np.ndarray, batch: int = 256) -> Judgement:
    """What the classifier says of images (N, H, W, 3) uint8."""
    features = th.cat([model.features(to_tensor(part)) for part in np.array_split(pixels, -(-len(pixels) // batch))])
    return Judgement(model.head(features).argmax(1).numpy(), features.numpy())
