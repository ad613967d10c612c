"""Images a second of training: ours on cached latents against the official code in pixels, on the same pictures.

Each in a process of its own reads what its own loader gives. The U-Nets are equally wide (64 channels, levels 1,2,2,
two blocks a level), and both see the same number of images a step. Ours attends at half the size of its latents; the
official one at 16 and 8 pixels a side as is its default, which spares it the attention over thousands of pixels.
"""

from contextlib import closing

import contenders
import rivals
from apart import ApartTraining
from contenders import Case, scratch, unet
from pictures import draw_images
from timing import Settings, Way, compare


def measure(settings: Settings) -> dict:
    """Entries `pairs` and `notes` of the results."""
    contenders.start()
    notes, pairs = rivals.lacking(), []
    sizes = [(32, 2)] if settings.tiny else [(64, 8), (128, 4)]
    with scratch() as folder:
        for size, batch in sizes if rivals.official("unet") else []:
            data = draw_images(folder / f"{size}px", 8 if settings.tiny else 64, size=size)
            pairs.append(against_pixels(data, size, batch, settings))
    return {"pairs": pairs, "notes": notes}


def against_pixels(data, size: int, batch: int, settings: Settings) -> dict:
    """One image size."""
    width = {"channels": 32, "mult": "1,2", "blocks": 1} if settings.tiny else {"channels": 64}
    latents = unet(image_size=size, attention=size // 8, **width)
    pixels = unet(image_size=size, vae_path="pixel", attention="16,8", **width)
    here, there = (Case("", batch, flags | {"data_dir": str(data)}) for flags in (latents, pixels))
    with closing(ApartTraining(here)) as ours, closing(ApartTraining(there, "official")) as rival:
        sides = Way("cached latents", ours.run, batch), Way("official, pixels", rival.run, batch, turn=rival.turn)
        return compare(f"training at {size} px", *sides, "images/s", settings, batch=batch)
