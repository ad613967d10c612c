"""Read a network's flags off its weights.

A checkpoint that does not fit is the most frequent trouble upstream's users report, and the answer is always a list of
flags. Almost all of them show in the keys and shapes of the state_dict; a U-Net's number of heads does not.
"""

import re
from typing import Any

import torch as th

from .config import UserError, first_few
from .dit import SIZES, LightningDiT

NAMED = 3  # how many differing keys an error names
FAMILIES = {"unet": "U-Net", "dit": "LightningDiT"}  # --network, and what it is called
LABEL_TABLES = ("label_emb.weight", "y_embedder.embedding_table.weight")
DIT_FLAGS = ("model_type", "use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "learn_sigma")
PARTS = ("ema", "model", "state_dict")  # of a training checkpoint, the weights to sample from first


# ---- which weights a file holds


def network_weights(loaded: dict, *, path="the checkpoint") -> dict[str, th.Tensor]:
    """The weights of a network, whatever wrote the file.

    Args:
        loaded: what `checkpoint.load` gave: a state_dict, LightningDiT's {"model", "ema", "opt", ...} (the average is
            taken if there is one), or Lightning's {"state_dict": ...}.
        path: how an error names the file.
    Returns:
        The state_dict, without the `module.` that data-parallel wrappers put before its keys.
    Raises:
        UserError: no weights in it.
    """
    part = part_of(loaded)
    weights = loaded[part] if part else loaded
    named = isinstance(weights, dict) and all(isinstance(k, str) and th.is_tensor(v) for k, v in weights.items())
    if not named or not weights:
        what = "an optimizer's state" if isinstance(loaded, dict) and "param_groups" in loaded else "no weights"
        raise UserError(f"{path} holds {what}: give a model*.pt or ema_*.pt, or a checkpoint of LightningDiT")
    return {re.sub(r"^(module\.)+", "", key): value for key, value in weights.items()}


def part_of(loaded) -> str:
    """The name of the part that `network_weights` takes; empty where the file holds nothing but a state_dict."""
    known = [name for name in PARTS if isinstance(loaded, dict) and isinstance(loaded.get(name), dict)]
    return next((name for name in known if loaded[name]), "")


# ---- loading, or the flags that would fit


def load_weights(model: th.nn.Module, state_dict: dict[str, th.Tensor], *, path, given: dict) -> None:
    """Load the weights of a U-Net or a LightningDiT strictly.

    Args:
        given: the flags that the model was made with.
    Raises:
        UserError: another shape; names the first differing keys and the flags that would fit.
    """
    if not state_dict or not all(th.is_tensor(value) for value in state_dict.values()):
        raise UserError(f"{path} holds no weights: give a model*.pt or ema_*.pt")
    wanted = model.state_dict()
    differ = [key for key in wanted if key not in state_dict or state_dict[key].shape != wanted[key].shape]
    differ += [key for key in state_dict if key not in wanted]
    if not differ:
        model.load_state_dict(state_dict)
        return
    raise UserError(
        f"{path} is a network of another shape ({first_few(differ, NAMED)} differ): "
        + _advice(model, state_dict, given)
    )


def _advice(model, state_dict, given) -> str:
    mine = "dit" if isinstance(model, LightningDiT) else "unet"
    unet, dit = flags_of(state_dict), dit_flags_of(state_dict)
    if dit and _unnamed_size(dit):
        return _unnamed_size(dit)
    flags = {name: dit[name] for name in (*DIT_FLAGS, "class_cond")} if dit else dict(unet)
    if unet:
        side: Any = model.input_size if mine == "dit" else model.image_size
        flags |= _attention_flag(state_dict, side, str(given.get("attention_resolutions", "")))
    remedy = [f"--{name} {value}" for name, value in flags.items() if not _same(given.get(name), value)]
    theirs = "dit" if dit else "unet" if unet else mine
    if theirs != mine:
        remedy.insert(0, f"--network {theirs}")
    if dit or unet:
        remedy += _latents(model, state_dict, dit) + _classes(model, state_dict)
    return f"give {', '.join(remedy)}" if remedy else f"it is not a {FAMILIES[mine]} of this kind"


def _unnamed_size(dit: dict) -> str:
    """What to say of a transformer that is none of the table; empty if it is one."""
    named = SIZES[dit["model_type"]]
    if all(dit[name] == size for name, size in named.items()):
        return ""
    found = ", ".join(f"{name} {dit[name]}" for name in named)
    return f"it has {found}, which no --model_type has; the nearest is {dit['model_type']}"


def _latents(model, state_dict, dit: dict) -> list[str]:
    """What to give if the network was made for other latents; of what side, only a transformer shows."""
    if dit:
        side = model.input_size if isinstance(model, LightningDiT) else model.image_size
        channels, size = dit["in_channels"], dit["input_size"]
        shape = f"{channels} x {size} x {size}"
        same = (channels, size) == (model.in_channels, side)
        return [] if same else [f"the --vae_path and --image_size that make latents of {shape}"]
    channels = state_dict["input_blocks.0.0.weight"].shape[1]
    return [] if channels == model.in_channels else [f"the --vae_path that makes latents of {channels} channels"]


def _classes(model, state_dict) -> list[str]:
    """What to give if two tables of labels differ in length; a row may be the null label's, which cannot be seen."""
    theirs, mine = _label_rows(state_dict), _label_rows(model.state_dict())
    if theirs is None or mine is None or theirs == mine:
        return []
    null = model.class_dropout_prob > 0
    data = f"data with {theirs - null} classes, for so many it was trained on"
    if theirs - mine == (-1 if null else 1):
        return [f"--class_dropout_prob {0 if null else 0.1}, or {data}"]
    return [data]


def _label_rows(state_dict) -> int | None:
    return next((len(state_dict[key]) for key in LABEL_TABLES if key in state_dict), None)


def _attention_flag(state_dict, image_size: int, given: str) -> dict:
    """`attention_resolutions`, if those given attend elsewhere; sizes that no level has do not count."""
    levels = len(_levels({key: tuple(value.shape) for key, value in state_dict.items()})[0])
    factors = {image_size // int(size) for size in given.split(",") if size.strip().isdigit() and int(size)}
    found = attention_factors(state_dict)
    if factors & {2**level for level in range(levels)} == set(found):
        return {}
    return {"attention_resolutions": ",".join(str(image_size // factor) for factor in found) or '""'}


def _same(given, found) -> bool:
    return str(given).replace(" ", "") == str(found)


# ---- reading a U-Net


def flags_of(state_dict: dict[str, th.Tensor]) -> dict:
    """The flags that a U-Net's keys and shapes show; empty if they are not those of a `UNetModel`.

    Left out: `attention_resolutions`, which needs the image size (see `attention_factors`), and the number of heads.
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    try:
        width = shapes["time_embed.0.weight"][1]
        in_channels, out_channels = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
        shapes["output_blocks.0.0.in_layers.0.weight"]  # an encoder has none
    except (KeyError, IndexError):
        return {}
    widths, blocks, updown = _levels(shapes)
    flags = {
        "num_channels": width,
        "num_res_blocks": blocks,
        "channel_mult": ",".join(f"{w / width:g}" for w in widths),
        "class_cond": "label_emb.weight" in shapes,
        "learn_sigma": out_channels == 2 * in_channels,
        "resblock_updown": updown,
    }
    inner, emb = shapes.get("input_blocks.1.0.out_layers.0.weight"), shapes.get("input_blocks.1.0.emb_layers.1.weight")
    if inner and emb:
        flags["use_scale_shift_norm"] = emb[0] == 2 * inner[0]
    return flags


def _levels(shapes) -> tuple[list[int], int, bool]:
    """Width of each level, residual blocks a level, and whether residual blocks resize.

    With R blocks and L levels there are L (R + 1) output blocks, and the first that doubles the size is number R.
    """
    pattern = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight")
    resizing = [match for match in map(pattern.match, shapes) if match]
    count = 1 + max(int(match.group(1)) for match in map(re.compile(r"input_blocks\.(\d+)\.").match, shapes) if match)
    blocks = min((int(match.group(1)) for match in resizing), default=count - 1)
    firsts = range(1, count, blocks + 1)
    widths = [shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in firsts]
    return widths, blocks, any(match.group(2) != "conv" for match in resizing)


def attention_factors(state_dict) -> list[int]:
    """The downsampling factors at which a U-Net attends, read off its input blocks."""
    widths, blocks, _ = _levels({key: tuple(value.shape) for key, value in state_dict.items()})
    attends = {int(m.group(1)) for m in (re.match(r"input_blocks\.(\d+)\.1\.qkv", key) for key in state_dict) if m}
    return sorted({2 ** ((n - 1) // (blocks + 1)) for n in attends})


# ---- reading a transformer


def dit_flags_of(state_dict: dict[str, th.Tensor]) -> dict:
    """What the keys and shapes of a LightningDiT, DiT or SiT show; empty if they are not those of one.

    Returns:
        Flags: `model_type` (the nearest name of `dit.SIZES`), `use_qknorm`, `use_swiglu`, `use_rope`, `use_rmsnorm`,
        `wo_shift`, `learn_sigma`, `class_cond` (more rows than one class and a null label need). Sizes: `depth`,
        `hidden_size`, `num_heads` (that of `model_type` where neither rotations nor norms show it), `patch_size`,
        `in_channels` and `input_size` of the latents, `label_rows` (classes and, perhaps, the null label).
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        grid = round(shapes["pos_embed"][1] ** 0.5)
        outputs, rows = shapes["final_layer.linear.weight"][0], shapes["y_embedder.embedding_table.weight"][0]
        modulations = shapes["blocks.0.adaLN_modulation.1.weight"][0]
        shapes["blocks.0.attn.qkv.weight"]
    except (KeyError, IndexError, ValueError):
        return {}
    depth = 1 + max(int(key.split(".")[1]) for key in shapes if re.match(r"blocks\.\d+\.", key))
    name = _nearest_size(depth, width, patch)
    head = shapes.get("feat_rope.freqs_cos", shapes.get("blocks.0.attn.q_norm.weight", (0,)))[-1]
    return {
        "model_type": name,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in shapes,
        "use_swiglu": "blocks.0.mlp.w12.weight" in shapes,
        "use_rope": "feat_rope.freqs_cos" in shapes,
        "use_rmsnorm": "blocks.0.norm1.weight" in shapes,
        "wo_shift": modulations == 4 * width,
        "learn_sigma": outputs == 2 * channels * patch**2,
        "class_cond": rows > 2,
        "depth": depth,
        "hidden_size": width,
        "num_heads": width // head if head else SIZES[name]["num_heads"],
        "patch_size": patch,
        "in_channels": channels,
        "input_size": grid * patch,
        "label_rows": rows,
    }


def _nearest_size(depth: int, width: int, patch: int) -> str:
    """The name whose depth and width differ by the smallest factors, of the right patch before the wrong one."""

    def distance(size):
        factors = (depth / size["depth"], width / size["hidden_size"])
        return sum(max(f, 1 / f) for f in factors), size["patch_size"] != patch

    return min(SIZES, key=lambda name: distance(SIZES[name]))
