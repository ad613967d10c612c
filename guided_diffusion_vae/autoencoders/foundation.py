"""Alignment of latents with a frozen vision foundation model (VA-VAE: Yao et al. 2025).

DINOv2 or MAE give one feature vector f for 16 x 16 pixels, and latents z are projected to the same width. Over the n
positions i, j of an image, with margins m below which nothing is asked:

    marginal cosine            1/n   sum_i  relu(1 - m - cos(z_i, f_i))
    marginal distance matrix   1/n^2 sum_ij relu(|cos(z_i, z_j) - cos(f_i, f_j)| - m)

The networks are transformers'. Weights come from a local folder of transformers, a local file in timm's layout, or a
VA-VAE training checkpoint, which carries them; nothing is downloaded.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from ..checkpoint import load_state_dict
from ..config import UserError

STRIDE = 16  # pixels of the image for one feature, whatever the model's patch
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of images in [0, 1]
CHECKPOINT_PREFIX = "foundation_model.model."
MODEL_TYPES = {"dinov2": "dinov2", "mae": "vit_mae"}  # our kind -> transformers' name for it


class FoundationModel(nn.Module):
    """Frozen features of images.

    Args:
        model: transformers' Dinov2Model or ViTMAEModel.
        upstream_input: give it the images in [-1, 1], as the published VA-VAE did, not normalised as in its training.
    """

    model: Any  # its parts are transformers' own
    mean: th.Tensor
    std: th.Tensor

    def __init__(self, model: nn.Module, *, upstream_input: bool = False):
        super().__init__()
        self.model, self.upstream_input = model, upstream_input
        self.model.embeddings.interpolate_pos_encoding = self.positions
        self.register_buffer("mean", th.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", th.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        """Stay in eval: the features are a target, and a caller's `.train()` must not move it."""
        return super().train(False)

    @property
    def kind(self) -> str:
        return next(kind for kind, name in MODEL_TYPES.items() if name == self.model.config.model_type)

    @property
    def channels(self) -> int:
        return self.model.config.hidden_size

    def positions(self, tokens: th.Tensor, height: int, width: int) -> th.Tensor:
        """The position embedding for this image size.

        As timm resizes it (bicubic, antialiased), because that is what VA-VAE was trained against; transformers' own
        takes another cubic and skips pixels where it shrinks.
        """
        table = self.model.embeddings.position_embeddings  # (1, 1 + n, C): class token, then a square of patches
        grid, side = (height // self.patch, width // self.patch), math.isqrt(table.shape[1] - 1)
        if grid == (side, side):
            return table
        square = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        square = F.interpolate(square, grid, mode="bicubic", align_corners=False, antialias=True)
        return th.cat([table[:, :1], square.flatten(2).transpose(1, 2)], dim=1)

    @property
    def patch(self) -> int:
        return self.model.embeddings.patch_embeddings.projection.kernel_size[0]

    @th.no_grad()
    def forward(self, x: th.Tensor) -> th.Tensor:
        """Features after the last norm, without the class token.

        Args:
            x: (N, 1 or 3, H, W) in [-1, 1]; grey counts as three equal channels. The image is resized such that
                16 pixels become one patch: 256 -> 224 for DINOv2's patches of 14, unchanged for MAE's of 16.
        Returns:
            (N, C, H // 16, W // 16)
        """
        grid = [size // STRIDE for size in x.shape[2:]]
        size = [self.patch * n for n in grid]
        x = x.expand(-1, 3, -1, -1)
        if list(x.shape[2:]) != size:
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        if not self.upstream_input:
            x = ((x + 1) / 2 - self.mean) / self.std
        settings = {}
        if self.kind == "mae":  # it hides no patch at mask_ratio 0, but shuffles them by this noise: sorted, they stay
            noise = th.arange(grid[0] * grid[1], device=x.device, dtype=th.float32).expand(len(x), -1)
            settings = {"noise": noise, "interpolate_pos_encoding": True}
        tokens = self.model(x, **settings).last_hidden_state[:, 1:]
        return tokens.transpose(1, 2).unflatten(2, grid)


# ---- the two losses --------------------------------------------------------------------------------------------------


def marginal_cosine(z: th.Tensor, f: th.Tensor, margin: float) -> th.Tensor:
    """Mean over positions and batch of relu(1 - margin - cos(z_i, f_i)).

    Args:
        z: (N, C, h, w); f: (N, C, h', w'), resized to z's grid (see `to_grid_of`).
    """
    cosine = F.cosine_similarity(at_least_float32(z), at_least_float32(to_grid_of(z, f)), dim=1)
    return F.relu(1 - margin - cosine).mean()


def marginal_distance_matrix(z: th.Tensor, f: th.Tensor, margin: float) -> th.Tensor:
    """Mean over pairs of positions and batch of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).

    Args:
        z: (N, C, h, w); f: (N, C', h', w'), resized to z's grid (see `to_grid_of`).
    """
    return F.relu((cosines(z) - cosines(to_grid_of(z, f))).abs() - margin).mean()


def to_grid_of(z: th.Tensor, f: th.Tensor) -> th.Tensor:
    """f, resized bilinearly where z has another grid (an f8 autoencoder has 32 x 32 latents for 16 x 16 features)."""
    return f if f.shape[2:] == z.shape[2:] else F.interpolate(f, z.shape[2:], mode="bilinear", align_corners=False)


def cosines(x: th.Tensor) -> th.Tensor:
    """Between all pairs of positions: (N, C, h, w) -> (N, h w, h w); in float32 also under autocast."""
    with th.autocast(x.device.type, enabled=False):
        x = F.normalize(at_least_float32(x), dim=1).flatten(2)
        return x.transpose(1, 2) @ x


def at_least_float32(x: th.Tensor) -> th.Tensor:
    return x.to(th.promote_types(x.dtype, th.float32))


# ---- files -----------------------------------------------------------------------------------------------------------


def load_foundation(
    kind: str, path: str | Path, *, upstream_input: bool = False, num_heads: int | None = None
) -> FoundationModel:
    """A frozen foundation model with local weights.

    Args:
        kind: "dinov2" or "mae".
        path: transformers' folder, or a file: timm's layout or a VA-VAE training checkpoint.
        num_heads: of a file's model, whose shapes do not show it; width / 64 if not given.
    Raises:
        UserError: transformers is missing, or the path does not hold a model of this kind; names --vf_path.
    """
    if not str(path) or not Path(path).exists():
        raise UserError(
            f"--vf_path {str(path)!r} does not exist: --use_vf {kind} needs its weights (transformers' folder,"
            " timm's file, or a VA-VAE training checkpoint); or give --use_vf none"
        )
    if Path(path).is_dir():
        return FoundationModel(from_folder(kind, Path(path)), upstream_input=upstream_input)
    try:
        model = from_timm(kind, drop_prefix(load_state_dict(path)), num_heads)
        return FoundationModel(model, upstream_input=upstream_input)
    except UserError as error:
        raise UserError(f"--vf_path {path}: {error}") from error


def model_of(kind: str) -> tuple[Any, Any]:
    """transformers' configuration and model of a kind."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"--use_vf {kind} needs transformers: pip install guided_diffusion_vae[vf]") from error
    if kind == "dinov2":
        return transformers.Dinov2Config, transformers.Dinov2Model
    return transformers.ViTMAEConfig, transformers.ViTMAEModel


def from_folder(kind: str, path: Path) -> nn.Module:
    """The model in a folder that transformers wrote."""
    _, model_class = model_of(kind)
    try:
        found = json.loads((path / "config.json").read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"--vf_path {path} is not a folder of transformers: no config.json to read") from error
    if found != MODEL_TYPES[kind]:
        raise UserError(f"--vf_path {path} holds a {found} model, --use_vf {kind} needs {MODEL_TYPES[kind]}")
    unmasked = {"mask_ratio": 0.0} if kind == "mae" else {}
    try:
        model, report = model_class.from_pretrained(
            path, local_files_only=True, output_loading_info=True, dtype=th.float32, **unmasked
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--vf_path {path} cannot be read ({str(error).splitlines()[0]})") from error
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise UserError(f"--vf_path {path} lacks {missing[0]} ({len(missing)} keys in all)")
    return model


def drop_prefix(state_dict: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """The foundation model's part of a VA-VAE training checkpoint; other files as they are."""
    part = {k.removeprefix(CHECKPOINT_PREFIX): v for k, v in state_dict.items() if k.startswith(CHECKPOINT_PREFIX)}
    return part or state_dict


def from_timm(kind: str, weights: dict[str, th.Tensor], num_heads: int | None = None) -> nn.Module:
    """The model of weights in timm's layout; its size is read off their shapes.

    Raises:
        UserError: these are not the weights of a model of this kind.
    """
    config_class, model_class = model_of(kind)
    try:
        width, hidden = weights["cls_token"].shape[-1], len(weights["blocks.0.mlp.fc1.weight"])
        patch, positions = weights["patch_embed.proj.weight"].shape[-1], weights["pos_embed"].shape[1]
    except KeyError as error:
        raise UserError(f"not the weights of a {kind} model in timm's layout: {error.args[0]} is missing") from error
    kind_settings = {
        "dinov2": {"mlp_ratio": hidden // width, "use_mask_token": False},
        "mae": {"intermediate_size": hidden, "mask_ratio": 0.0},
    }
    config = config_class(
        hidden_size=width,
        num_hidden_layers=1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        num_attention_heads=num_heads or max(1, width // 64),
        patch_size=patch,
        image_size=patch * math.isqrt(positions - 1),
        layer_norm_eps=1e-6,
        **kind_settings[kind],
    )
    model = model_class(config)
    load_timm(kind, model, weights)
    return model


def load_timm(kind: str, model: nn.Module, weights: dict[str, th.Tensor]) -> None:
    """Load weights in timm's layout into transformers' model.

    Raises:
        UserError: keys or shapes that do not fit; names the first.
    """
    given, wanted = to_transformers(kind, weights), model.state_dict()
    differ = [key for key in wanted if key not in given or given[key].shape != wanted[key].shape]
    differ += [key for key in given if key not in wanted]
    if differ:
        raise UserError(f"not the weights of this {kind} model: {differ[0]} ({len(differ)} keys in all) differ")
    model.load_state_dict(given)


OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
INSIDE = {"attn.proj": "attention.o_proj", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
BLOCKS = {
    "dinov2": ("encoder.layer", INSIDE),
    "mae": ("layers", INSIDE | {"norm1": "layernorm_before", "norm2": "layernorm_after"}),
}


def to_transformers(kind: str, weights: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """timm's keys -> transformers'; the joint projection to queries, keys and values becomes three.

    What is not part of the encoder, such as a head, is left out.
    """
    blocks, inside = BLOCKS[kind]
    found = {}
    for key, value in weights.items():
        name, _, end = key.rpartition(".")  # end: weight, bias; the names below may hold it
        block = re.match(r"blocks\.(\d+)\.", key)
        if block is None:
            if new := OUTSIDE.get(key) or (name in OUTSIDE and f"{OUTSIDE[name]}.{end}"):
                found[new] = value.float()
            continue
        place, name = f"{blocks}.{block[1]}", name.removeprefix(block[0])
        if name == "attn.qkv":
            for letter, part in zip("qkv", value.float().chunk(3), strict=True):
                found[f"{place}.attention.{letter}_proj.{end}"] = part
        else:
            within = key.removeprefix(block[0])
            found[f"{place}.{inside.get(within) or f'{inside.get(name, name)}.{end}'}"] = value.float()
    return found
