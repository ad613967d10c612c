"""How far generated images are from real ones: the official guided-diffusion evaluator, without TensorFlow.

    python evaluations/evaluator.py REF SAMPLE [--inception_weights FILE] [--json FILE] [--html FILE]

REF and SAMPLE are .npz files (arr_0: uint8 (N, height, width, 3)) or folders of images. Prints the official five lines
in their order and spelling (the progress lines before them, too, but for the word TensorFlow), and after them numbers
that those five need to be understood. Progress bars and warnings go to standard error. Inception's weights must be
brought along; without them user or vae features take their place, every number bears their name, and none is called
FID; nor is there an sFID, which other features have not. User features are learned from half of REF: give the folder
with most real images. As a module: python -m evaluations.evaluator.
"""

import os
import sys

if not __package__:  # run as a file: its folder must not hide Python's own html and statistics
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from evaluations import official
from evaluations.batches import Batch, open_batch, warn
from evaluations.features import (
    FeatureSpace,
    can_learn_users,
    dinov2_space,
    extracted,
    inception_space,
    learn_user_space,
    saved_user_space,
    tested,
    vae_space,
)
from evaluations.findings import Finding, Section
from evaluations.html import as_dict, refuse_unwritable, render, write_json, write_text
from evaluations.inception import WHERE_TO_GET, find_weights
from evaluations.manifold import Fidelity, fidelity
from evaluations.measure import FEWEST_IN_SET
from evaluations.side_by_side import at_the_same_number, shuffled
from evaluations.statistics import classifier_inception_score, kernel_distance_subsets, subset_size
from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import UserError, create_argparser, parse_run, refuse_below

SUBSETS = 100  # of the kernel distance
HALF_FLAW = 0.01  # more than this between official and exact precision or recall is worth a warning
SAMPLES = "samples_*x*x*x3.npz"  # what the sampler calls them
TITLE = "Generated images against reference images"


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
    """The official evaluator has no options; these are ours."""

    # inception, dinov2, user, vae, or a user classifier's file; empty: inception if its weights are found
    features: str = ""
    inception_weights: str = ""  # .pb or .pth; empty: INCEPTION_WEIGHTS, this folder, then torch's cache
    check_weights: bool = True  # False: take other weights of Inception's layout; no number is then called FID
    dinov2_path: str = ""  # transformers' folder or timm's file, for --features dinov2
    vae_path: str = "microdoppler-f4"  # the autoencoder of --features vae
    batch_size: int = 64  # images at a time
    grey_to_rgb: bool = False  # repeat images of one channel to three
    skip_bad_images: bool = False  # leave out images of a folder that cannot be read instead of refusing
    extras: bool = True  # the numbers after the official five
    cache_dir: str = ""  # keep features in this folder, and take them from it; empty: nowhere
    json: str = ""  # also write all numbers to this file
    html: str = ""  # also write a page to this file
    seed: int = 0  # of random subsets and splits, and of the user classifier

    def __post_init__(self):
        refuse_below(self, 1, "batch_size")
        refuse_below(self, 0, "seed")


def main(argv=None):
    parser = create_argparser(EvaluatorConfig, description=f"{__doc__}\nInception's weights: {WHERE_TO_GET}.")
    parser.add_argument("ref_batch", metavar="REF", help="reference: .npz or folder of real images")
    parser.add_argument("sample_batch", metavar="SAMPLE", help=".npz or folder of generated images")
    paths, run = parser.parse_args(argv), parse_run(parser, argv)
    if run.dry_run:
        print(run)
        return
    refuse_outputs(run, {"REF": paths.ref_batch, "SAMPLE": paths.sample_batch})
    ref, sample = (
        open_batch(path, flag, grey_to_rgb=run.grey_to_rgb, skip_bad_images=run.skip_bad_images, say=warn)
        for path, flag in ((paths.ref_batch, "REF"), (paths.sample_batch, "SAMPLE"))
    )
    space = choose_space(run, ref)
    warnings = input_warnings(ref, sample, space)
    for warning in warnings:
        warn(warning)
    print("warming up...", flush=True)
    print("computing reference batch activations...", flush=True)
    ref_features = extracted(space, ref, run.cache_dir)
    print("computing/reading reference batch statistics...", flush=True)
    ref_features |= stored_statistics(space, ref, ref_features)
    print("computing sample batch activations...", flush=True)
    sample_features = extracted(space, sample, run.cache_dir)
    print("computing/reading sample batch statistics...", flush=True)
    sample_features |= stored_statistics(space, sample, sample_features)
    print("Computing evaluations...", flush=True)
    if space.learned is not None:
        space, weak = tested(space, ref.labels, ref_features["probabilities"])
        warnings += weak
        for warning in weak:
            warn(warning)
    if space.class_weight is None:
        lacking = "no sFID" if "probabilities" in ref_features else "no Inception Score and no sFID"
        print(f"features: {space.about}; {lacking}, which only Inception has", flush=True)
    numbers = headline(space, ref_features, sample_features)
    for name, value in numbers.items():
        print(f"{name}: {value}", flush=True)

    x, y, notes, lines, more = compared(space, ref_features), sample_features["pool"], [], {}, {}
    findings = as_findings(space, numbers, ref_features, sample_features)
    sections = [Section(title="The evaluator's numbers", findings=findings, notes=warnings)]
    if run.extras:
        lines, more, notes = beyond(space, numbers, ref_features, sample_features, seed=run.seed)
        worst = shuffled(space, ref, run.seed)
        section, floor_lines, floor_numbers = at_the_same_number(space, x, y, worst, seed=run.seed)
        lines, more = lines | floor_lines, more | floor_numbers
        for name, text in lines.items():
            print(f"{name}: {text}")
        for note in notes:
            warn(note)
        sections[0].notes.extend(notes)
        sections.append(section)
    about = {
        **{"REF": paths.ref_batch, "REF images": len(ref), "SAMPLE": paths.sample_batch, "SAMPLE images": len(sample)},
        **{"features": space.about, "fingerprint": space.fingerprint, "dimensions": x.shape[1]},
        **{"reference images compared": len(x), "seed": run.seed},
        **{"torch": version("torch"), "numpy": np.__version__, "python": platform.python_version()},
    }
    if run.json:
        also = {"numbers": numbers, "more": more if space.class_weight is None else lines}  # Inception's: as ever
        write_json(run.json, also | as_dict(TITLE, sections, about | {"digests": [ref.digest, sample.digest]}))
    if run.html:
        write_text(run.html, render(TITLE, sections, about))


def refuse_outputs(run, inputs: dict[str, str]) -> None:
    """Raise if --json or --html cannot be written, or would overwrite each other or an input."""
    taken = {Path(path).resolve(): name for name, path in inputs.items()}
    for flag, path in (("--json", run.json), ("--html", run.html)):
        if path:
            refuse_unwritable(path, flag)
            other = taken.setdefault(Path(path).resolve(), flag)
            if other != flag:
                raise UserError(f"{flag} {path} is {other}, too; give another name")


def choose_space(run, ref: Batch) -> FeatureSpace:
    """The feature space that the flags name, or the best there is; says so if that is not Inception's.

    Raises:
        UserError: an unknown name, or one whose weights or labels are lacking.
    """
    options: dict[str, Any] = {"batch_size": run.batch_size, "progress": True}
    on_device: dict[str, Any] = options | {"device": dist_util.dev()}
    name = run.features
    if name in ("", "inception"):
        weights = find_weights(run.inception_weights)
        if weights is not None:
            if not run.check_weights:
                warn(f"the weights {weights} are unchecked: no number is called FID, all bear inception-unchecked")
            return inception_space(weights, check=run.check_weights, **on_device)
        if name:
            raise UserError(
                "--features inception needs its weights: give --inception_weights or INCEPTION_WEIGHTS; --help tells"
                " where to get them"
            )
        name = "user" if can_learn_users(ref) else "vae"
        warn(
            "no weights of Inception (--inception_weights or INCEPTION_WEIGHTS): no FID, but numbers of"
            f" {name} features; --help tells where to get them"
        )
    if name == "user":
        return learn_user_space(ref, seed=run.seed, **options)
    if name == "vae":
        return vae_space(run.vae_path, **on_device)
    if name == "dinov2":
        return dinov2_space(run.dinov2_path, **on_device)
    if not Path(name).is_file():
        raise UserError(f"--features is {name}; give inception, dinov2, user, vae, or a user classifier's file")
    return saved_user_space(name, **options)


def input_warnings(ref: Batch, sample: Batch, space: FeatureSpace) -> list[str]:
    """What is no error but makes numbers mean less."""
    warnings = [*ref.notes, *sample.notes]
    if ref.shape[1:3] != sample.shape[1:3]:
        (h, w), (height, width), side = ref.shape[1:3], sample.shape[1:3], space.size
        resized = " and ".join(batch.flag for batch in (ref, sample) if batch.shape[1:3] != (side, side))
        seen = f"{resized} brought to {side} x {side} for the {space.name} features, which may add to the distance"
        seen = seen if side else "the distance is also one of resolutions"
        warnings.append(f"REF is {h} x {w} and SAMPLE {height} x {width}: {seen}")
    if ref.shape == sample.shape and all(map(np.array_equal, ref.iterate(), sample.iterate())):
        warnings.append("REF and SAMPLE hold the same images: the numbers say nothing about generated ones")
    if is_of_sampler(ref.path):
        warnings.append(
            f"REF {ref.path} looks like the sampler's: it should be real images; are REF and SAMPLE swapped?"
        )
    return warnings


def is_of_sampler(path) -> bool:
    """Whether a file is called as the sampler calls its samples, or a folder (or the one its png/ is in) has such."""
    path = Path(path)
    if not path.is_dir():
        return path.match(SAMPLES)
    return any((path.parent if path.name == "png" else path).glob(SAMPLES))


def stored_statistics(space: FeatureSpace, batch: Batch, features: dict) -> dict[str, official.Stats]:
    """The statistics that a batch brings along, which the official evaluator takes in place of its images'.

    Raises:
        UserError: they are of other features than Inception's.
    """
    if batch.stats is None:
        return {}
    if space.name != "inception":
        warn(f"{batch.flag} {batch.path} stores statistics of Inception, which {space.name} features have no use for")
        return {}
    kept = {"stats": official.Stats(batch.stats["mu"], batch.stats["sigma"])}
    kept["spatial_stats"] = official.Stats(batch.stats["mu_s"], batch.stats["sigma_s"])
    for stats, name in (("stats", "pool"), ("spatial_stats", "spatial")):
        if len(kept[stats].mu) != features[name].shape[1]:
            raise UserError(
                f"{batch.flag} {batch.path} stores statistics of {len(kept[stats].mu)} features, Inception has"
                f" {features[name].shape[1]}: make the file with make_reference.py"
            )
    return kept


def compared(space: FeatureSpace, ref_features: dict) -> np.ndarray:
    """The reference's features (n, d), without images that the space was learned from."""
    pool = ref_features["pool"]
    return pool if space.learned is None else pool[~space.learned]


def headline(space: FeatureSpace, ref: dict, sample: dict) -> dict[str, float]:
    """The five numbers, officially, of Inception; of another space those that it has, under its name."""
    if space.class_weight is not None:
        reference, samples = (
            official.Batch(part["pool"], part["spatial"], part.get("stats"), part.get("spatial_stats"))
            for part in (ref, sample)
        )
        five = official.five_numbers(reference, samples, space.class_weight)
        return {_name(space, k): v for k, v in five.items()}
    x, y = compared(space, ref), sample["pool"]
    score = {}
    if "probabilities" in sample:
        score[f"IS_{space.name}"] = classifier_inception_score(sample["probabilities"])
    ball = official.NEIGHBOURS
    if min(len(x), len(y)) < FEWEST_IN_SET:
        raise UserError(
            f"{space.name} features are compared from {FEWEST_IN_SET} images on; here are {len(x)} and {len(y)}"
        )
    near = fidelity(x, y, k_ball=ball)
    return score | {
        space.distance: official.frechet_of_features(x, y),
        f"Precision_{space.name}": near.precision,
        f"Recall_{space.name}": near.recall,
    }


def beyond(
    space: FeatureSpace, numbers, ref: dict, sample: dict, *, seed: int
) -> tuple[dict[str, str], dict[str, float], list[str]]:
    """Numbers of all images that the five lack, in words and as numbers, by name; and warnings about the five."""
    x, y, end = compared(space, ref), sample["pool"], space.ending
    n, m, d = len(x), len(y), x.shape[1]
    kid, size = kernel_distance_subsets(x, y, SUBSETS, seed=seed), subset_size(n, m)
    lines, notes = {f"KID{end}": f"{kid.mean:.6g} +- {kid.std:.2g} ({SUBSETS} subsets of {size} images)"}, []
    more = {f"KID{end}": kid.mean, f"KID{end} std": kid.std}
    few = [str(count) for count, side in ((n, ref), (m, sample)) if "stats" not in side and count <= d]
    if few:
        notes.append(
            f"{space.distance} of {' and '.join(few)} images in {d} dimensions: a covariance of so few lacks full rank"
            " and the distance is far too high; read it against its floor, or KID"
        )
    if min(n, m) < FEWEST_IN_SET:
        notes.append(f"density and coverage need {FEWEST_IN_SET} images a side; here are {n} and {m}")
        return lines, more, notes
    near = fidelity(x, y)
    if space.class_weight is not None:
        lines |= {f"{name}{end} (fp32, centred)": f"{getattr(near, name.lower())}" for name in ("Precision", "Recall")}
        notes += half_precision_warnings(numbers, near, end)
    if space.class_weight is not None and math.isnan(numbers[_name(space, "Inception Score")]):
        probabilities = official.class_probabilities(sample["pool"], space.class_weight)
        notes.append(
            f"the Inception Score is nan, officially, as a probability is 0 in {official.underflows(probabilities)}"
            f" images; where that adds nothing it is {classifier_inception_score(probabilities):.6g}"
        )
    last = {f"Density{end}": near.density, f"Coverage{end}": near.coverage}
    return lines | {name: f"{value}" for name, value in last.items()}, more | last, notes


def half_precision_warnings(numbers: dict[str, float], exact: Fidelity, end: str = "") -> list[str]:
    """Where the official float16 arithmetic leads astray: features that lie closer together than to 0."""
    pairs = ((f"Precision{end}", exact.precision), (f"Recall{end}", exact.recall))
    return [
        f"{name} is {numbers[name]:.4f} in the official float16 but {value:.4f} in float32 about the mean: trust the"
        " latter"
        for name, value in pairs
        if abs(numbers[name] - value) > HALF_FLAW
    ]


def as_findings(space: FeatureSpace, numbers: dict[str, float], ref: dict, sample: dict) -> list[Finding]:
    """The headline's numbers; a user classifier's Inception score beside that of the real images compared."""
    ends = {}
    if space.class_weight is None:
        n, m = len(compared(space, ref)), len(sample["pool"])
        about = f"of all images, {n} real and {m} generated: not comparable with a distance of other numbers"
        ends[space.distance] = {"about": about}
    if "probabilities" in ref:
        p = ref["probabilities"] if space.learned is None else ref["probabilities"][~space.learned]
        about = f"exp E KL(p(user | image) || p(user)) of {len(sample['pool'])} images; real: {len(p)} of the reference"
        ends[f"IS_{space.name}"] = {"real": classifier_inception_score(p), "worst": 1.0, "about": about}
    return [Finding(name=k, value=v, form="{:.6g}", **ends.get(k, {})) for k, v in numbers.items()]


def _name(space: FeatureSpace, official_name: str) -> str:
    """What one of the five numbers is called in this space: its own name if the weights are known to be Inception's."""
    if space.name == "inception":
        return official_name
    return {"Inception Score": "IS", "FID": "FD", "sFID": "sFD"}.get(official_name, official_name) + space.ending


if __name__ == "__main__":
    dist_util.run_main(main)
