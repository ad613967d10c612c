"""Make a reference for the evaluator, this one and the official one, of a folder of real images or an .npz.

    python evaluations/make_reference.py --data_dir data/test --out reference.npz

The file holds mu, sigma, mu_s and sigma_s, Inception's statistics of all images (mean float32, covariance float64);
arr_0, random images of them as uint8 (N, height, width, 3), for precision and recall; and arr_1, their labels, if there
are any. Without Inception's weights it holds arr_0 and arr_1 alone, and the evaluator computes the statistics of these.
"""

import os
import sys

if not __package__:  # run as a file: its folder must not hide Python's own html and statistics
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluations.batches import Batch, open_batch, warn
from evaluations.features import FeatureSpace, inception_space
from evaluations.html import refuse_unwritable
from evaluations.inception import WHERE_TO_GET, find_weights
from evaluations.official import official_moments
from guided_diffusion_vae import dist_util
from guided_diffusion_vae.checkpoint import atomic_write
from guided_diffusion_vae.config import UserError, create_argparser, parse_run, refuse_below

UNCHECKED = "the weights are unchecked: if they are not Inception's, nor are mu, sigma, mu_s and sigma_s"


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What the reference is made of, and where it goes."""

    data_dir: str = ""  # folder of real images (subfolders are users), or an .npz with arr_0
    out: str = ""  # the .npz to write
    num_images: int = 10000  # images kept in arr_0, drawn at random; all if there are fewer, or with 0
    image_size: int = 0  # bring all to this size (centre crop, mean over the area); 0: they have one size already
    inception_weights: str = ""  # .pb or .pth; empty: INCEPTION_WEIGHTS, this folder, then torch's cache
    check_weights: bool = True  # False: take other weights of Inception's layout; what is computed is then no FID
    batch_size: int = 64  # images at a time
    grey_to_rgb: bool = False  # repeat images of one channel to three
    skip_bad_images: bool = False  # leave out images that cannot be read instead of refusing
    seed: int = 0  # of the draw

    def __post_init__(self):
        refuse_below(self, 1, "batch_size")
        refuse_below(self, 0, "num_images", "image_size", "seed")


def main(argv=None):
    run = parse_run(
        create_argparser(ReferenceConfig, description=f"{__doc__}\nInception's weights: {WHERE_TO_GET}."), argv
    )
    if run.dry_run:
        print(run)
        return
    if not run.data_dir:
        raise UserError("--data_dir is empty; give a folder of real images or an .npz")
    if not run.out.endswith(".npz"):
        raise UserError(f"--out is {run.out!r}; give the name of an .npz to write")
    if run.image_size and not Path(run.data_dir).is_dir():
        raise UserError(f"--image_size {run.image_size} is for folders; {run.data_dir} is none: leave it out")
    if Path(run.out).resolve() == Path(run.data_dir).resolve():
        raise UserError(f"--out {run.out} is --data_dir, which would be overwritten; give another name")
    refuse_unwritable(run.out, "--out")
    names = ("grey_to_rgb", "image_size", "skip_bad_images")
    batch = open_batch(run.data_dir, "--data_dir", say=print, **{name: getattr(run, name) for name in names})
    space = _inception(run)
    for note in batch.notes:
        warn(note)
    reference = make_reference(batch, space, num_images=run.num_images, seed=run.seed)
    save_reference(run.out, reference)
    n, height, width, _ = reference["arr_0"].shape
    print(f"written: {run.out} with {', '.join(reference)}; {n} of {len(batch)} images of {height} x {width}")


def make_reference(batch: Batch, space: FeatureSpace | None, *, num_images: int, seed: int) -> dict[str, np.ndarray]:
    """Statistics of all images if Inception is given, and some of the images with their labels.

    Returns:
        arrays by the official names.
    """
    reference = {}
    if space is not None:
        features = space.extract(batch)
        for name, mean, covariance in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
            reference[mean], reference[covariance] = official_moments(features[name])
    count = min(num_images or len(batch), len(batch))
    places = np.sort(np.random.default_rng(seed).choice(len(batch), count, replace=False))
    reference["arr_0"] = batch.take(places)
    if batch.labels is not None:
        reference["arr_1"] = np.asarray(batch.labels)[places].astype(np.int64)
    return reference


def save_reference(path, reference: dict[str, Any]) -> None:
    """Write the .npz, whole or not at all, in a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as handle:
        np.savez(handle, **reference)


def _inception(run) -> FeatureSpace | None:
    """Inception if its weights are found; says what the reference will lack if not."""
    weights = find_weights(run.inception_weights)
    if weights is None:
        warn(
            "no weights of Inception (--inception_weights or INCEPTION_WEIGHTS): the reference has images but no"
            " statistics; --help tells where to get them"
        )
        return None
    if not run.check_weights:
        warn(UNCHECKED)
    return inception_space(
        weights, check=run.check_weights, batch_size=run.batch_size, device=dist_util.dev(), progress=True
    )


if __name__ == "__main__":
    dist_util.run_main(main)
