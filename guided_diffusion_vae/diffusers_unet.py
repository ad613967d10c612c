"""The U-Net as diffusers' `UNet2DModel`, and back: the same network under other names.

diffusers counts levels where ADM counts blocks: `input_blocks.5.0` may be `down_blocks.1.resnets.1`. Its attention has
three linear maps where ADM has one 1x1 convolution, whose rows are (head, q k v, d), or (q k v, head, d) in the new
order. Everything else is a name: the numbers of a network are the same to rounding, its weights to the bit.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch as th
import torch.nn as nn

from .config import UserError, first_few
from .unet import AttentionBlock, Downsample, QKVAttentionLegacy, ResBlock, SuperResModel, UNetModel, Upsample

GROUPS, EPS = 32, 1e-5  # of every norm
QKV = "to_q", "to_k", "to_v"
LEAVES = {  # of a part: our name of a layer with weights -> UNet2DModel's
    ResBlock: {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    },
    AttentionBlock: {"norm": "group_norm", "qkv": QKV, "proj_out": "to_out.0"},
    Downsample: {"op": "conv"},
    Upsample: {"conv": "conv"},
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MIDDLE = "resnets.0", "attentions.0", "resnets.1"
PLAIN, RESNET = ("DownBlock2D", "UpBlock2D"), ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
ATTENDS = "AttnDownBlock2D", "AttnUpBlock2D"
ALWAYS = {  # what an ADM U-Net has whatever its flags
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_num_groups": GROUPS,
    "attn_norm_num_groups": GROUPS,
    "norm_eps": EPS,
    "add_attention": True,
    "class_embed_type": None,
}
MOST_LEVELS, MOST_BLOCKS, WIDEST = 16, 100, 1 << 16  # of a configuration that is read at all


# ---- where each part goes


def parts(model: UNetModel) -> Iterator[tuple[str, str, nn.Module]]:
    """(our name, UNet2DModel's, module) of every part that has weights."""
    modules = dict(model.named_modules())
    yield from ((ours, theirs, modules[ours]) for ours, theirs in ENDS.items() if ours in modules)
    yield from _in_levels("input_blocks", list(model.input_blocks)[1:], model.num_res_blocks + 1, "down", first=1)
    for n, (place, layer) in enumerate(zip(MIDDLE, model.middle_block, strict=True)):
        yield f"middle_block.{n}", f"mid_block.{place}", layer
    yield from _in_levels("output_blocks", model.output_blocks, model.num_res_blocks + 1, "up")


def _in_levels(ours, blocks, each, way, first=0):
    """The layers of `each` blocks a level: residual blocks, attention, and what resizes at the level's end."""
    for n, block in enumerate(blocks):
        level, i = divmod(n, each)
        for m, layer in enumerate(block):
            resizes = isinstance(layer, Downsample | Upsample) or getattr(layer, "updown", False)
            kind = "attentions" if isinstance(layer, AttentionBlock) else "resnets"
            place = f"{way}samplers.0" if resizes else f"{kind}.{i}"
            yield f"{ours}.{n + first}.{m}", f"{way}_blocks.{level}.{place}", layer


def to_diffusers(model: UNetModel) -> dict[str, th.Tensor]:
    """The weights under UNet2DModel's names, in its shapes."""
    state, found = model.state_dict(), {}
    for ours, theirs, layer in _pairs(model):
        value = state[ours]
        if isinstance(layer, AttentionBlock) and value.ndim == 3:
            value = value[..., 0]  # a 1x1 convolution is a linear map
        values = [value] if len(theirs) == 1 else _of_heads(value, layer)
        found |= {name: part.contiguous() for name, part in zip(theirs, values, strict=True)}
    return found


def from_diffusers(model: UNetModel, state_dict: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
    """The weights of a UNet2DModel under our names, in float32.

    Args:
        model: says the names and shapes; may be on the meta device.
    Raises:
        UserError: weights are missing, left over, or of another shape; names the first few.
    """
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    found, used, differ = {}, set(), []
    for ours, theirs, layer in _pairs(model):
        used |= set(theirs)
        rows, *others = wanted[ours]
        linear = isinstance(layer, AttentionBlock) and len(others) == 2
        shape = (rows // len(theirs), *(others[:-1] if linear else others))
        values = [state_dict[name].float() for name in theirs if name in state_dict]
        if len(values) < len(theirs) or any(tuple(value.shape) != shape for value in values):
            differ += theirs
            continue
        whole = values[0] if len(values) == 1 else _to_heads(values, layer)
        found[ours] = whole.reshape(wanted[ours]).contiguous()
    differ += [name for name in state_dict if name not in used]
    if differ:
        raise UserError(f"its weights are not those of its config.json: {first_few(differ, 3)} differ")
    return found


def _pairs(model) -> Iterator[tuple[str, tuple[str, ...], nn.Module]]:
    """(our key, UNet2DModel's keys, the part they belong to): one key, but for qkv three."""
    known = model.state_dict().keys()
    for ours, theirs, layer in parts(model):
        for mine, others in LEAVES.get(type(layer), {"": ""}).items():
            for kind in ("weight", "bias"):
                key = _join(ours, mine, kind)
                if key in known:
                    names = others if isinstance(others, tuple) else (others,)
                    yield key, tuple(_join(theirs, name, kind) for name in names), layer


def _join(*words):
    return ".".join(filter(None, words))


def _layout(layer):
    """How the rows of qkv unfold, and which dimension of that tells q, k and v apart."""
    legacy = isinstance(layer.attention, QKVAttentionLegacy)
    return ((layer.num_heads, 3, -1), 1) if legacy else ((3, layer.num_heads, -1), 0)


def _of_heads(rows, layer):
    """q, k and v, each with its heads one after the other, of the rows of qkv."""
    sizes, where = _layout(layer)
    return [part.flatten(0, 1) for part in rows.unflatten(0, sizes).unbind(where)]


def _to_heads(values, layer):
    """The rows of qkv of q, k and v."""
    _, where = _layout(layer)
    return th.stack([value.unflatten(0, (layer.num_heads, -1)) for value in values], where).flatten(0, 2)


# ---- what it is


def unet_config(model: UNetModel) -> dict:
    """The arguments of the UNet2DModel that computes the same.

    Raises:
        UserError: a UNet2DModel cannot; names the flag.
    """
    down: Any = model.input_blocks
    first: Any = model.middle_block[0]
    if isinstance(model, SuperResModel) or down[0][0].weight.ndim != 4:
        raise UserError("diffusers' UNet2DModel has no super-resolution and two dimensions: this U-Net is not exported")
    widths = [int(mult * model.model_channels) for mult in model.channel_mult]
    if widths[0] != model.model_channels:
        raise UserError(
            f"--channel_mult {','.join(f'{m:g}' for m in model.channel_mult)} begins with {model.channel_mult[0]:g}:"
            " diffusers' UNet2DModel gives time as many channels as the first level has, so only 1 can be exported"
        )
    if any(isinstance(layer, Downsample) and not layer.use_conv for block in down for layer in block):
        raise UserError(
            "conv_resample=False resizes without weights, as no UNet2DModel of diffusers does: not exported"
        )
    updown = any(getattr(layer, "updown", False) for block in down for layer in block)
    attending = _levels_that_attend(model)
    return {
        **ALWAYS,
        "sample_size": model.image_size,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "down_block_types": _kinds(0, attending, updown),
        "up_block_types": _kinds(1, attending, updown)[::-1],
        "downsample_type": "resnet" if updown else "conv",
        "upsample_type": "resnet" if updown else "conv",
        "attention_head_dim": _head_dim(model),
        "resnet_time_scale_shift": "scale_shift" if first.use_scale_shift_norm else "default",
        "dropout": float(first.dropout),
        "num_class_embeds": len(model.label_emb.weight) if model.num_classes is not None else None,
    }


def _levels_that_attend(model) -> list[bool]:
    each = model.num_res_blocks + 1
    firsts: list[Any] = [model.input_blocks[1 + level * each] for level in range(len(model.channel_mult))]
    return [any(isinstance(layer, AttentionBlock) for layer in block) for block in firsts]


def _kinds(way: int, attending: list[bool], updown: bool) -> list[str]:
    """The types of the blocks from the finest level on, on the way down (0) or up (1)."""
    return [ATTENDS[way] if attends else (RESNET if updown else PLAIN)[way] for attends in attending]


def _attention(model) -> list[AttentionBlock]:
    return [layer for layer in model.modules() if isinstance(layer, AttentionBlock)]


def _head_dim(model) -> int | None:
    """The one width of all heads; None is one head a level."""
    dims = sorted({block.channels // block.num_heads for block in _attention(model)})
    heads = sorted({block.num_heads for block in _attention(model)})
    if len(dims) == 1 or heads == [1]:
        return dims[0] if len(dims) == 1 else None
    raise UserError(
        f"--num_heads {', '.join(map(str, heads))} makes heads of {', '.join(map(str, dims))} channels; diffusers'"
        " UNet2DModel has one width for all heads, as a training with --num_head_channels has: this one is not exported"
    )


def unet_flags(config: dict) -> dict:
    """The flags of the U-Net that a UNet2DModel's arguments describe; `refuse_other_unet` says whether it is that one.

    Args:
        config: of a config.json, with the defaults of what it leaves out.
    Returns:
        Flags; `image_size` is the side of what the network sees, in pixels or of the latent.
    Raises:
        UserError: an argument is of another kind than UNet2DModel's.
    """
    try:
        size = config["sample_size"]
        size = size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size
        widths, blocks = [int(width) for width in config["block_out_channels"]], int(config["layers_per_block"])
        down = [str(kind) for kind in config["down_block_types"]]
        head, base = config["attention_head_dim"], widths[0]
        classes = config["num_class_embeds"]
        if not 1 <= len(widths) == len(down) <= MOST_LEVELS or not 1 <= blocks <= MOST_BLOCKS:
            raise ValueError(f"{len(widths)} widths, {len(down)} levels of {blocks} blocks")
        if not all(0 < width <= WIDEST for width in widths) or not isinstance(size, int) or size < 1:
            raise ValueError(f"sample_size {size}, block_out_channels {widths}")
        factors = [2**level for level, kind in enumerate(down) if kind == ATTENDS[0]]
        return {
            "image_size": size,
            "num_channels": base,
            "channel_mult": ",".join(_times(width, base) for width in widths),
            "num_res_blocks": blocks,
            "attention_resolutions": ",".join(str(size // factor) for factor in factors if size >= factor),
            "num_heads": 1 if head is None else 4,
            "num_head_channels": -1 if head is None else int(head),
            "num_heads_upsample": -1,
            "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
            "resblock_updown": "resnet" in _resizers(config),
            "dropout": float(config["dropout"]),
            "class_cond": classes is not None,
            "learn_sigma": int(config["out_channels"]) == 2 * int(config["in_channels"]),
        }
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"its config.json is not a UNet2DModel's ({' '.join(str(error).split())[:80]})") from error


def _times(width: int, base: int) -> str:
    """A width relative to the base as `--channel_mult` takes it, so that it comes out whole."""
    mult = width / base
    mult = mult if int(mult * base) == width else math.nextafter(mult, math.inf)
    return str(int(mult)) if mult == int(mult) else repr(mult)


def _resizers(config) -> set[str]:
    """How the levels resize: conv, resnet, or other names."""
    found = set()
    for way, types in (("down", config["down_block_types"][:-1]), ("up", config["up_block_types"][:-1])):
        number = ("down", "up").index(way)
        for kind in types:
            plain = {PLAIN[number]: "conv", RESNET[number]: "resnet", ATTENDS[number]: config[f"{way}sample_type"]}
            found.add(plain.get(kind, kind))
    return found


def refuse_other_unet(model: UNetModel, config: dict) -> None:
    """Raise if a UNet2DModel computes something else than this U-Net.

    Args:
        config: see `unet_flags`.
    Raises:
        UserError: names the arguments that differ, with both values.
    """
    ours, differ = unet_config(model), []
    theirs = {**config, "act_fn": "silu" if config["act_fn"] == "swish" else config["act_fn"]}
    if theirs["attn_norm_num_groups"] is None and theirs["resnet_time_scale_shift"] == "default":
        theirs["attn_norm_num_groups"] = theirs["norm_num_groups"]
    if theirs["attention_head_dim"] is None and all(block.num_heads == 1 for block in _attention(model)):
        theirs["attention_head_dim"] = ours["attention_head_dim"]
    if theirs["time_embedding_dim"] == 4 * model.model_channels:
        theirs["time_embedding_dim"] = None
    resizers = _resizers(theirs)
    if len(resizers) > 1 or not resizers <= {"conv", "resnet"}:
        differ.append(f"down_block_types and up_block_types resize by {', '.join(sorted(map(str, resizers)))}")
    for name in ("down_block_types", "up_block_types"):
        mine, other = ([kind.startswith("Attn") for kind in types[name]] for types in (ours, theirs))
        last = str(theirs[name][-1])
        if mine != other or last not in (*PLAIN, *RESNET, *ATTENDS):
            differ.append(f"{name} is {theirs[name]}, here {ours[name]}")
    read = {"sample_size", "dropout", "down_block_types", "up_block_types", "downsample_type", "upsample_type"}
    for name in ours.keys() - read:
        same = list(theirs[name]) == ours[name] if isinstance(ours[name], list) else theirs[name] == ours[name]
        if not same:
            differ.append(f"{name} is {theirs[name]}, here {ours[name]}")
    if differ:
        raise UserError(f"it is a UNet2DModel that is no ADM U-Net: {first_few(sorted(differ), 3, '; ')}")
