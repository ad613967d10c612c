"""Images a second into training: encoded at every batch, from the cache, from extracted shards; and of extraction.

All go through `load_data_with_vae`, in the same shuffled order, and end as model latents on the device. The share of a
training step is the time that the loop waits for its batch, measured in the loop itself, so that what worker processes
do meanwhile counts for them and what they take from it counts against them.
"""

import itertools
import time

import contenders
import rivals
from contenders import Case, OurTraining, scratch, unet
from pictures import draw_images
from timing import Settings, Way, compare, row, seconds, single

from guided_diffusion_vae.data.latent_extract import ExtractConfig, extract_latents
from guided_diffusion_vae.image_datasets import load_data, load_data_with_vae
from guided_diffusion_vae.vae_wrapper import VAEInterface

SIZE = 64
WORKERS = 0, 1, 2
LOOKED_AT = 5  # steps of which the wait is measured, after one that fills the workers' queues


def measure(settings: Settings) -> dict:
    """Entries `pairs`, `rows` and `notes` of the results."""
    contenders.start()
    notes, images, batch = rivals.lacking(), 16 if settings.tiny else 256, 4 if settings.tiny else 32
    width = {"channels": 32, "mult": "1,2", "blocks": 1} if settings.tiny else {}
    case = Case("latents", batch, unet(image_size=SIZE, **width))
    with scratch() as folder:
        pictures, shards = draw_images(folder / "images", images), folder / "latents"
        rows = [extraction(pictures, folder, images, settings)]
        config = ExtractConfig(data_dir=str(pictures), out_dir=str(shards), image_size=SIZE)
        extract_latents(config, raw_autoencoder(), say=lambda line: None)
        places = {"encoded at every batch": (pictures, False), "cached": (pictures, True), "shards": (shards, True)}

        def stream(name, workers=0):
            data_dir, cache = places[name]
            about = {"data_dir": data_dir, "cache_latents": cache, "num_workers": workers, "image_size": SIZE}
            return load_data_with_vae(**about, vae=case.vae, batch_size=batch, class_cond=True, say=lambda line: None)

        training = OurTraining(case)
        for name, workers in itertools.product(places, WORKERS[:2] if settings.tiny else WORKERS):
            way = Way(name, stream(name, workers).__next__, batch)
            share = waiting(stream(name, workers), training, 2 if settings.tiny else LOOKED_AT)
            note = f"{share:.1%} of a training step of the 64-channel U-Net at batch {batch}"
            about = {"share": share, "workers": workers, "note": note}
            rows.append(single(f"{name}, {workers} workers", way, "images/s", settings, **about))
        pairs = []
        for name in ("cached", "shards"):
            sides = (Way(what, stream(what).__next__, batch) for what in (name, "encoded at every batch"))
            pairs.append(compare(f"latents into training at {SIZE} px", *sides, "images/s", settings, batch=batch))
        pairs += against_official(pictures, batch, settings)
    return {"pairs": pairs, "rows": rows, "notes": notes}


def raw_autoencoder() -> VAEInterface:
    """As latent_extract.py opens it: its latents are stored as they come."""
    return VAEInterface("microdoppler-f4", scale_factor=1.0)


def extraction(pictures, folder, images: int, settings: Settings) -> dict:
    """Images a second from a folder of pictures to shards."""
    vae, took = raw_autoencoder(), []
    for number in range(1 if settings.tiny else 3):
        config = ExtractConfig(data_dir=str(pictures), out_dir=str(folder / f"out_{number}"), image_size=SIZE)
        took.append(seconds(lambda config=config: extract_latents(config, vae, say=lambda line: None)))
    return row(f"extraction at {SIZE} px", "images/s", (images / value for value in took), images=images)


def waiting(stream, training: OurTraining, steps: int) -> float:
    """The share of a training step that the loop waits for its batch."""
    waited = whole = 0.0
    for number in range(steps + 1):
        begin = time.perf_counter()
        batch, _ = next(stream)
        came = time.perf_counter()
        training.batch = batch, {}
        training.step()
        if number:
            waited, whole = waited + came - begin, whole + time.perf_counter() - begin
    return waited / whole


def against_official(pictures, batch: int, settings: Settings) -> list[dict]:
    """Pictures as pixels, by one worker each."""
    if not rivals.official("unet"):
        return []
    about = {"data_dir": str(pictures), "batch_size": batch, "image_size": SIZE, "class_cond": False}
    streams = load_data(**about, seed=0), rivals.official("image_datasets").load_data(**about)
    sides = (Way(name, stream.__next__, batch) for name, stream in zip(("ours", "official"), streams, strict=True))
    return [compare(f"pixels into training at {SIZE} px", *sides, "images/s", settings, batch=batch)]
