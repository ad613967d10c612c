"""Read a U-Net's flags off its weights.

A checkpoint that does not fit is the most frequent trouble upstream's users report, and the answer is always a list of
flags. Almost all of them show in the keys and shapes of the state_dict; the number of heads does not.
"""

import re

import torch as th

from .config import UserError

NAMED = 3  # how many differing keys an error names


def load_weights(model: th.nn.Module, state_dict: dict[str, th.Tensor], *, path, given: dict) -> None:
    """Load a U-Net's weights strictly.

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
    found = flags_of(state_dict)
    if found:
        found |= _attention_flag(state_dict, model.image_size, str(given.get("attention_resolutions", "")))
    remedy = [f"--{name} {value}" for name, value in found.items() if not _same(given.get(name), value)]
    if not remedy and "label_emb.weight" in state_dict and "label_emb.weight" in wanted:
        remedy = [f"data with {len(state_dict['label_emb.weight'])} classes, for so many it was trained on"]
    more = f" and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
    raise UserError(
        f"{path} is a network of another shape ({', '.join(differ[:NAMED])}{more} differ): "
        + (f"give {', '.join(remedy)}" if remedy else "it is not a U-Net of this kind")
    )


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
