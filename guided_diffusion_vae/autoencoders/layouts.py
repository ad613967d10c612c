"""One set of weights, two layouts: LDM's (also VA-VAE's, and ours) and diffusers'.

The networks are the same; names differ, the levels of diffusers' decoder count the other way round, and its attention
has linear layers where LDM has 1x1 convolutions. A file's configuration is read off its keys and shapes.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch as th

from ..config import UserError
from .kl import KLAutoencoder, KLConfig

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers' until 2023


def diffusers_key(key: str, levels: int) -> str:
    """The name in diffusers' AutoencoderKL of a tensor with this LDM name."""
    key = re.sub(r"^(encoder|decoder)\.norm_out", r"\1.conv_norm_out", key)
    key = re.sub(r"\.mid\.block_([12])", lambda m: f".mid_block.resnets.{int(m[1]) - 1}", key)
    key = re.sub(r"\.mid\.attn_1", ".mid_block.attentions.0", key)
    key = re.sub(r"^encoder\.down\.(\d+)", r"encoder.down_blocks.\1", key)
    key = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", key)
    key = re.sub(r"(_blocks\.\d+)\.block\.", r"\1.resnets.", key)
    key = re.sub(r"(_blocks\.\d+)\.attn\.", r"\1.attentions.", key)
    key = key.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    key = key.replace("nin_shortcut", "conv_shortcut")
    return re.sub(r"(attentions\.\d+)\.(norm|q|k|v|proj_out)\.", lambda m: f"{m[1]}.{ATTENTION[m[2]]}.", key)


def is_diffusers(state_dict) -> bool:
    """Whether the keys are diffusers'."""
    return any(key.startswith("encoder.down_blocks.") for key in state_dict)


def to_ldm(state_dict: dict[str, th.Tensor], model: KLAutoencoder) -> dict[str, th.Tensor]:
    """A diffusers state_dict under LDM's keys and shapes (attention: linear layers become 1x1 convolutions).

    Keys that LDM has no name for are kept as they are.
    """
    pattern = re.compile(rf"(attentions\.\d+)\.({'|'.join(OLD_ATTENTION)})\.")
    state_dict = {pattern.sub(lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", key): v for key, v in state_dict.items()}
    ldm_key = {diffusers_key(key, len(model.config.ch_mult)): key for key in model.state_dict()}
    linear = re.compile(r"attentions\.\d+\.to_(q|k|v|out\.0)\.weight")
    return {
        ldm_key.get(key, key): value[:, :, None, None] if linear.search(key) and value.ndim == 2 else value
        for key, value in state_dict.items()
    }


def to_diffusers(model: KLAutoencoder) -> dict[str, th.Tensor]:
    """The weights under diffusers' keys and shapes."""
    levels, found = len(model.config.ch_mult), {}
    for key, value in model.state_dict().items():
        name = diffusers_key(key, levels)
        linear = re.search(r"attentions\.\d+\.to_", name) and value.ndim == 4
        found[name] = value[:, :, 0, 0] if linear else value
    return found


def save_diffusers(
    model: KLAutoencoder,
    folder: str | Path,
    *,
    scale: float | tuple[float, ...] = 1.0,
    shift: float | Sequence[float] = 0.0,
    image_size: int = 256,
) -> None:
    """Write a folder that diffusers' `AutoencoderKL.from_pretrained` loads.

    Args:
        scale, shift: model latents are (z - shift) scale; numbers, or tuples of one for each channel. They go into the
            folder's configuration, as `scaling_factor` and `shift_factor`, or as `latents_std` and `latents_mean`.
    Raises:
        UserError: dropout or an `embed_dim` other than `z_channels`, which AutoencoderKL cannot express.
    """
    from diffusers import AutoencoderKL

    config = model.config
    if config.embed_dim != config.z_channels or config.dropout:
        raise UserError(
            f"diffusers' AutoencoderKL has no embed_dim ({config.embed_dim}) beside z_channels ({config.z_channels}),"
            f" and no dropout ({config.dropout}): export a model without them"
        )
    if isinstance(scale, tuple):
        assert not isinstance(shift, int | float)
        stored = {"scaling_factor": 1.0, "latents_std": [1 / s for s in scale], "latents_mean": list(shift)}
    else:
        stored = {"scaling_factor": scale, "shift_factor": shift or None}
    attending = [config.attends(level) for level in range(len(config.ch_mult))]
    settings: dict[str, Any] = {
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "latent_channels": config.embed_dim,
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "down_block_types": ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in attending],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in reversed(attending)
        ],
        "mid_block_add_attention": config.mid_attn,
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
        "sample_size": image_size,
        **stored,
    }
    twin = AutoencoderKL(**settings)
    twin.load_state_dict(to_diffusers(model))
    twin.save_pretrained(folder)


def infer_config(state_dict: dict[str, th.Tensor], **known) -> KLConfig:
    """Read the configuration off keys and shapes, of either layout.

    Args:
        known: what shapes cannot show: `norm_groups`, `dropout`.
    Raises:
        UserError: these are not the keys of a KL autoencoder.
    """
    diffusers = is_diffusers(state_dict)
    down, res, attn = ("down_blocks", "resnets", "attentions") if diffusers else ("down", "block", "attn")
    pattern = re.compile(rf"encoder\.{down}\.(\d+)\.{res}\.(\d+)\.conv1\.weight")
    blocks = {(int(m[1]), int(m[2])): state_dict[m[0]] for m in map(pattern.fullmatch, state_dict) if m}
    ends = [f"{part}.{conv}.weight" for part in ("encoder", "decoder") for conv in ("conv_in", "conv_out")]
    convs = [*blocks.values(), *(state_dict[end] for end in ends if end in state_dict)]
    convs += [state_dict[key] for key in ("post_quant_conv.weight",) if key in state_dict]
    whole = len(blocks) == math.prod(1 + max(numbers) for numbers in zip(*blocks, strict=True))
    if not whole or not all(end in state_dict for end in ends) or any(w.ndim != 4 or 0 in w.shape for w in convs):
        raise UserError("these are not the weights of a KL autoencoder (no encoder.conv_in, encoder.down... keys)")
    ch = state_dict["encoder.conv_in.weight"].shape[0]
    levels = 1 + max(level for level, _ in blocks)
    attending = [i for i in range(levels) if any(key.startswith(f"encoder.{down}.{i}.{attn}.") for key in state_dict)]
    z = state_dict["decoder.conv_in.weight"].shape[1]
    after = state_dict.get("post_quant_conv.weight")  # (z_channels, embed_dim, 1, 1)
    return KLConfig(
        ch=ch,
        ch_mult=tuple(blocks[level, 0].shape[0] // ch for level in range(levels)),
        num_res_blocks=1 + max(block for _, block in blocks),
        attn_resolutions=tuple(256 // 2**level for level in attending),
        in_channels=state_dict["encoder.conv_in.weight"].shape[1],
        out_ch=state_dict["decoder.conv_out.weight"].shape[0],
        z_channels=z,
        embed_dim=z if after is None else after.shape[1],
        mid_attn=any("mid.attn_1" in key or "mid_block.attentions" in key for key in state_dict),
        quant_convs=after is not None,
        **known,
    )


def from_state_dict(state_dict: dict[str, th.Tensor], **known) -> KLAutoencoder:
    """An autoencoder with these weights: LDM's, VA-VAE's or diffusers' keys, with LDM's prefix and losses left out.

    Raises:
        UserError: keys or shapes that do not fit; names the first few.
    """
    prefix = "first_stage_model."
    if any(key.startswith(prefix) for key in state_dict):
        state_dict = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    state_dict = {key: value.float() for key, value in state_dict.items() if key.startswith(parts)}
    config = infer_config(state_dict, **known)
    if any(config.ch * mult % config.norm_groups for mult in (1, *config.ch_mult)):
        raise UserError(
            f"{config.norm_groups} groups of the norms do not divide these widths ({config.ch} x {config.ch_mult});"
            " the number of groups is told by the file that vae_train.py wrote: give that one"
        )
    with th.device("meta"):  # no memory for a network before it is known that these are its weights
        plan = KLAutoencoder(config)
    if is_diffusers(state_dict):
        state_dict = to_ldm(state_dict, plan)
    wanted = plan.state_dict()
    differ = [key for key in wanted if key not in state_dict or state_dict[key].shape != wanted[key].shape]
    differ += [key for key in state_dict if key not in wanted]
    if differ:
        raise UserError(
            f"these weights are of another autoencoder: {', '.join(differ[:3])} ({len(differ)} keys) differ"
        )
    model = KLAutoencoder(config)
    model.load_state_dict(state_dict)
    return model
