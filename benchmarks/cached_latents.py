"""Images a second of training: ours on cached latents against the official code in pixels, on the same pictures.

Both read what their own loader gives, the U-Nets are equally wide (64 channels, levels 1,2,2, two blocks a level), and
both see the same number of images a step. Ours attends at half the size of its latents; the official one at 16 and 8
pixels a side as is its default, which spares it the attention over thousands of pixels.
"""

import contenders
import rivals
from contenders import Case, OurTraining, scratch, unet
from pictures import draw_images
from rivals import OfficialTraining
from timing import Settings, Way, compare

from guided_diffusion_vae.image_datasets import load_data_with_vae


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
    latents = Case("latents", batch, unet(image_size=size, attention=size // 8, **width))
    pixels = Case("pixels", batch, unet(image_size=size, vae_path="pixel", attention="16,8", **width))
    ours, rival = OurTraining(latents, channels_last=True), OfficialTraining(pixels)
    about = {"data_dir": data, "batch_size": batch, "image_size": size}
    cached = load_data_with_vae(**about, vae=latents.vae, say=lambda line: None)
    files = rivals.official("image_datasets").load_data(**about)

    def our_step():
        ours.batch = next(cached)
        ours.step()

    def official_step():
        rival.batch = next(files)
        rival.step()

    sides = Way("cached latents", our_step, batch), Way("official, pixels", official_step, batch)
    return compare(f"training at {size} px", *sides, "images/s", settings, batch=batch)
