"""LPIPS: how different two images look to a network that was trained to name objects (Zhang et al. 2018, equation 1).

Features of VGG16 at five depths are scaled to unit length over channels; a learnt weight for each channel counts their
squared difference:

    LPIPS(x, y) = sum_k mean_hw sum_c w_kc (f_k(x) / |f_k(x)| - f_k(y) / |f_k(y)|)^2        (w here is the paper's w^2)

The weights come from local files (`load_lpips`); nothing is downloaded. Keys are those of the LPIPS inside LDM and
VA-VAE checkpoints.
"""

import re
from collections import OrderedDict
from functools import reduce
from pathlib import Path
from typing import Any

import torch as th
import torch.nn as nn

from ..checkpoint import load_state_dict
from ..config import UserError

STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))  # VGG16: convolutions and relative width between two poolings
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # [-1, 1] images -> the statistics VGG was trained with
REMEDY = (
    "give torchvision's VGG16 and the LPIPS heads as --lpips_path vgg16-397923af.pth,vgg.pth, a folder with both,"
    " or a VA-VAE training checkpoint; or --perceptual_weight 0"
)


class LPIPS(nn.Module):
    """Perceptual distance of images in [-1, 1].

    Args:
        width: channels of the first stage; 64 is VGG16.
    """

    scaling_layer: Any  # with the buffers `shift` and `scale`

    def __init__(self, width: int = 64):
        super().__init__()
        self.scaling_layer = nn.Module()
        self.scaling_layer.register_buffer("shift", th.tensor(SHIFT).view(1, 3, 1, 1))
        self.scaling_layer.register_buffer("scale", th.tensor(SCALE).view(1, 3, 1, 1))
        self.net = vgg16_stages(width)
        for k, (_, factor) in enumerate(STAGES):
            head = nn.Conv2d(factor * width, 1, 1, bias=False)
            # Upstream's index 0 is a dropout, which only the training of the heads needed.
            setattr(self, f"lin{k}", nn.ModuleDict({"model": nn.Sequential(nn.Identity(), head)}))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        """Stay in eval: this is a measure, and a caller's `.train()` on the whole model must not change it."""
        return super().train(False)

    def features(self, x: th.Tensor) -> list[th.Tensor]:
        """relu1_2, 2_2, 3_3, 4_3 and 5_3 of unit length over channels."""
        h = (x - self.scaling_layer.shift) / self.scaling_layer.scale  # one channel becomes three here
        found = []
        for stage in self.net.children():
            h = stage(h)
            # vector_norm has gradient 0 where all channels are 0; the square root of a sum has NaN
            found.append(h / (th.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10))
        return found

    def forward(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        """LPIPS(x, y).

        Args:
            x, y: (N, 1 or 3, H, W) in [-1, 1], H and W at least 16; grey counts as three equal channels.
        Returns:
            (N,)
        """
        pairs = zip(self.features(x), self.features(y), strict=True)
        heads = (getattr(self, f"lin{k}")["model"] for k in range(len(STAGES)))
        by_stage = (head((f - g) ** 2).mean(dim=(1, 2, 3)) for head, (f, g) in zip(heads, pairs, strict=True))
        return reduce(th.add, by_stage)


def vgg16_stages(width: int) -> nn.Module:
    """VGG16's convolutions as slice1 to slice5; layers keep torchvision's numbers, which count over all stages."""
    net, number, c_in = nn.Module(), 0, 3
    for k, (convolutions, factor) in enumerate(STAGES):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if k else []
        for _ in range(convolutions):
            layers += [nn.Conv2d(c_in, factor * width, 3, padding=1), nn.ReLU()]
            c_in = factor * width
        numbered = OrderedDict((str(number + i), layer) for i, layer in enumerate(layers))
        setattr(net, f"slice{k + 1}", nn.Sequential(numbered))
        number += len(layers)
    return net


# ---- files -----------------------------------------------------------------------------------------------------------


def load_lpips(path: str | Path) -> LPIPS:
    """LPIPS with the weights of local files.

    Args:
        path: a file with all keys (ours, or a VA-VAE training checkpoint), or several files that hold them together,
            separated by commas or in one folder: torchvision's VGG16 and the LPIPS heads.
    Raises:
        UserError: a file or a key is missing; names --lpips_path and what to get.
    """
    if not str(path):
        raise UserError(f"--perceptual_weight needs the weights of LPIPS: {REMEDY}")
    found = {}
    try:
        for file in weight_files(str(path)):
            found |= {lpips_key(key): value.float() for key, value in load_state_dict(file).items()}
    except UserError as error:
        raise UserError(f"--lpips_path: {error}; {REMEDY}") from error
    first = found.get("net.slice1.0.weight")
    model = LPIPS() if first is None else LPIPS(len(first))
    wanted = model.state_dict()
    wrong = [key for key in wanted if not key.startswith("scaling") and _differ(found.get(key), wanted[key])]
    if wrong:
        raise UserError(f"--lpips_path {path} lacks {wrong[0]} ({len(wrong)} keys in all): {REMEDY}")
    model.load_state_dict({key: found.get(key, value) for key, value in wanted.items()})
    return model


def _differ(given, wanted) -> bool:
    return given is None or given.shape != wanted.shape


def weight_files(path: str) -> list[Path]:
    """The files that a path, a folder or a list with commas names."""
    if Path(path).is_dir():
        kinds = (".pt", ".pth", ".ckpt", ".safetensors")
        return sorted(file for file in Path(path).iterdir() if file.suffix in kinds)
    return [Path(part.strip()) for part in path.split(",")]


def lpips_key(key: str) -> str:
    """Our name of a tensor: a training checkpoint's prefix is dropped, torchvision's number is put into its slice."""
    key = key.removeprefix("loss.perceptual_loss.")
    if match := re.fullmatch(r"features\.(\d+)\.(weight|bias)", key):
        first_layers = (4, 9, 16, 23)  # of slices 2 to 5
        return f"net.slice{1 + sum(int(match[1]) >= n for n in first_layers)}.{match[1]}.{match[2]}"
    return key
