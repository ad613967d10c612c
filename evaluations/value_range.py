"""Is an array images, with numbers from 0 to 255, or are its axes or its numbers those of something else?"""

from collections.abc import Iterable

import numpy as np

from guided_diffusion_vae.config import UserError

TO_PIXELS = {
    "[-1, 1]": "((x + 1) * 127.5).round().clip(0, 255).astype('uint8')",
    "[0, 1]": "(x * 255).round().clip(0, 255).astype('uint8')",
}
CAST = {-1, 0, 1, 254, 255}  # what a mere cast to integers leaves of floats in [-1, 1]


def remedy_of(shape: tuple[int, ...]) -> str:
    """What to do about an array that is not (N, height, width, 3): a clause after what it is, or what it must be."""
    if len(shape) == 4 and shape[1] in (1, 3, 4) and shape[3] not in (1, 3, 4):
        return ", channels first; give channels last: x.transpose(0, 2, 3, 1)"
    if len(shape) == 4 and shape[3] == 4:
        return ", RGB with alpha; drop alpha: x[..., :3]"
    if len(shape) == 3 or shape[3:] == (1,):
        return ", grey; repeat it to three channels: np.stack([x.squeeze()] * 3, axis=-1)"
    return "; it must be (N, height, width, 3)"


def refuse_unit_range(blocks: Iterable[np.ndarray], dtype, at: str) -> None:
    """Raise if no float is beyond what [-1, 1] or [0, 1] with overshoot has; the first that is ends the look.

    Args:
        at: what an error calls the array.
    """
    low, high = np.inf, -np.inf
    for block in blocks:
        low, high = min(low, block.min()), max(high, block.max())
        if high > 4 or not np.isfinite([low, high]).all():
            return
    seen = "[-1, 1]" if low < 0 else "[0, 1]"
    remedy = TO_PIXELS[seen] if -1.5 < low and high < 1.5 else "convert it to uint8"
    raise UserError(f"{at}: arr_0 is {dtype} from {low:.3g} to {high:.3g}; it must be 0 to 255: {remedy}")


def look_for_casts(blocks: Iterable[np.ndarray], dtype, at: str) -> list[str]:
    """A note if the integers are 0, 1, 254 and 255 alone, as after a mere cast; the first other ends the look.

    Raises:
        UserError: none is above 1.
    """
    seen: set[int] = set()
    for block in blocks:
        seen |= set(np.unique(block).tolist())
        if not seen <= CAST:
            return []
    if max(seen) <= 1:
        floats = "[-1, 1]" if min(seen) < 0 else "[0, 1]"
        raise UserError(
            f"{at}: arr_0 is {dtype} from {min(seen)} to {max(seen)}; it must be 0 to 255: if it was cast from floats"
            f" in {floats}, write it again as {TO_PIXELS[floats]}"
        )
    if seen & {1, 254}:
        return [
            f"{at}: arr_0 holds 0, 1, 254 and 255 alone; if it was cast from floats in [-1, 1], write it again as"
            f" {TO_PIXELS['[-1, 1]']}"
        ]
    return []
