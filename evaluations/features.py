"""Feature spaces: what turns images into points whose clouds are compared.

inception   the 2015 network of FID, sFID and the Inception Score; its weights are the user's to bring
dinov2      DINOv2's class token at 224 pixels (FD_DINOv2); its weights, too
user        the user classifier, learned from half of the labelled reference, or from a file (FD_user)
vae         latents of the shipped autoencoder, averaged over a 4 x 4 grid (FD_vae)

A number belongs to its space: only Inception's distance is called FID, and only if its weights were checked. Features
may be kept in a folder, under the digests of the images and of the extractor.
"""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
import torch.nn.functional as F
from tqdm import tqdm

from guided_diffusion_vae.checkpoint import atomic_write, digest, load_state_dict
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.vae_wrapper import VAEInterface

from .batches import Batch
from .statistics import classifier_inception_score
from .user_classifier import SIZE, UserClassifier, to_input, train_user_classifier

GRID = 4  # cells a side that latents are averaged over
FEWEST = 4  # labelled images a class, so that two are learned from
Device = th.device | str  # torch takes either
MOST_LEARNED = 20_000  # images that the user classifier learns from
ENOUGH = 8  # images a user to learn from; below, or if it names few right, the user classifier is weak
DINOV2_SIZE = 224
VERSION = 1  # of the code that makes the features: a cache of another is not used


class FeatureSpace(NamedTuple):
    """A way to see images. `extract` gives `pool` (N, d), and further arrays that some spaces have:

    `spatial` (N, 2023) of Inception, `probabilities` (N, K) of the user classifier.
    """

    name: str
    fingerprint: str  # changes with any weight
    extract: Callable[[Batch], dict[str, Any]]
    about: str = ""  # a sentence without a full stop
    class_weight: np.ndarray | None = None  # (2048, 1008) of Inception's head
    learned: np.ndarray | None = None  # (N,) bool: reference images that the space was learned from
    size: int = 0  # side that images are brought to, where that is to be said

    @property
    def distance(self) -> str:
        """What the Frechet distance in this space is called."""
        return {"inception": "FID", "dinov2": "FD_DINOv2"}.get(self.name, f"FD_{self.name}")

    @property
    def ending(self) -> str:
        """What the names of other numbers end in; nothing for Inception."""
        return "" if self.name == "inception" else f"_{self.name}"


# ---- the spaces ------------------------------------------------------------------------------------------------------


def inception_space(
    path, *, check: bool = True, batch_size: int = 64, device: Device = "cpu", progress=False
) -> FeatureSpace:
    """Inception of 2015 from its .pb or .pth.

    Args:
        check: compare size and SHA-256 with the published file's; False takes other weights of the same layout, and
            the space is called inception-unchecked.
    """
    from .inception import features_of, load_inception

    model = load_inception(path, check=check).to(device)

    def extract(batch: Batch) -> dict[str, np.ndarray]:
        pool, spatial = features_of(model, _seen(batch, batch_size, progress), batch_size=batch_size)
        return {"pool": pool, "spatial": spatial}

    name, about = "inception", f"Inception of 2015, {path}"
    if not check:
        name, about = "inception-unchecked", f"{about}: unchecked weights, so compare within this report only"
    elif Path(path).suffix == ".pb":
        about += ": checked by its size, as no hash of it is public"
    return FeatureSpace(name, digest(path)[:16], extract, about, np.asarray(model.class_weight))


def user_space(judge: UserClassifier, *, learned=None, batch_size: int = 64, progress=False, about="") -> FeatureSpace:
    """The 64 penultimate activations of a user classifier, and its opinion who is walking."""

    def extract(batch: Batch) -> dict[str, np.ndarray]:
        seen = [_judged(judge, images) for images in _seen(batch, batch_size, progress)]
        pool, logits = (th.cat(parts) for parts in zip(*seen, strict=True))
        return {"pool": pool.numpy(), "probabilities": logits.double().softmax(dim=1).numpy()}

    return FeatureSpace("user", judge.fingerprint(), extract, about, learned=learned, size=SIZE)


def learn_user_space(reference: Batch, *, seed: int = 0, steps: int | None = None, **options) -> FeatureSpace:
    """A user classifier that learns from every second labelled image of the reference; the others are the reference.

    Args:
        steps: batches to learn from; None: what `train_user_classifier` takes.
    Raises:
        UserError: no labels, one class only, or a class with too few images.
    """
    if not can_learn_users(reference):
        raise UserError(
            f"--features user needs labels, {FEWEST} images of each of two classes or more, and {reference.flag}"
            f" {reference.path} has not: give a folder with a subfolder a user, or an .npz with arr_1"
        )
    learned = every_second(reference.labels)
    chosen = np.flatnonzero(learned)
    count = min(len(chosen), MOST_LEARNED)
    chosen = chosen[np.arange(count) * len(chosen) // count]
    users = np.unique(reference.labels, return_inverse=True)[1]
    judge = train_user_classifier(
        reference.take(chosen),
        users[chosen],
        int(users.max()) + 1,
        seed=seed,
        steps=steps,
        progress=options.get("progress", False),
    )
    about = (
        "the 64 penultimate activations, to compare within this report only, of a user classifier that learned from"
        f" {len(chosen)} images of {int(users.max()) + 1} users; the reference is the other {int((~learned).sum())}"
    )
    return user_space(judge, learned=learned, about=about, **options)


def tested(space: FeatureSpace, labels, probabilities) -> tuple[FeatureSpace, list[str]]:
    """A learned user space that also says how many images it names right, of those it has not learned from.

    Args:
        labels, probabilities: of the reference, (N,) and (N, K).
    Returns:
        the space, and a warning if it is weak: fewer than 8 images a user to learn from, or right less often than 3
        times by chance (of fewer than 5 users, half way from chance to always).
    """
    assert space.learned is not None
    users, aside = np.unique(labels, return_inverse=True)[1], ~space.learned
    k = int(users.max()) + 1
    right, wanted = float((probabilities.argmax(axis=1) == users)[aside].mean()), min(3 / k, (1 + 1 / k) / 2)
    each = min(int(space.learned.sum()), MOST_LEARNED) / k
    weak = [f"{each:.3g} images a user to learn from, {ENOUGH} are wanted"] if each < ENOUGH else []
    weak += [f"{right:.0%} of the others named right, {wanted:.0%} are wanted"] if right < wanted else []
    remedy = "give the training folder as REF, or more images"
    warnings = [f"{space.name} features are weak ({'; '.join(weak)}): {remedy}"] if weak else []
    score = classifier_inception_score(probabilities[aside])
    about = (
        f"{space.about}, of which it names {right:.0%} right (chance {1 / k:.0%}), IS_{space.name} {score:.3g} of {k}"
    )
    return space._replace(about=about), warnings


def saved_user_space(path, **options) -> FeatureSpace:
    """A user classifier from a file: `checkpoint.save(judge.state_dict(), path)`.

    Raises:
        UserError: no such file, or other weights.
    """
    weights = load_state_dict(path)
    try:
        judge = UserClassifier(len(weights["head.weight"]))
        judge.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"--features {path} holds other weights than those of a user classifier") from error
    return user_space(judge.eval(), about=f"the 64 penultimate activations of the user classifier {path}", **options)


def vae_space(vae_path: str, *, batch_size: int = 64, device: Device = "cpu", progress=False) -> FeatureSpace:
    """Means of the posterior, of images at 64 x 64, averaged over a 4 x 4 grid: 16 numbers a latent channel."""
    vae = VAEInterface(vae_path, sample_posterior=False, default_scale=1.0).to(device)

    def extract(batch: Batch) -> dict[str, np.ndarray]:
        latents = (vae.encode_batch(to_input(images).to(device)) for images in _seen(batch, batch_size, progress))
        return {"pool": th.cat([F.adaptive_avg_pool2d(z, GRID).flatten(1).cpu() for z in latents]).numpy()}

    about = f"latents of {vae_path}, averaged over {GRID} x {GRID} cells"
    return FeatureSpace("vae", vae.fingerprint, extract, about, size=SIZE)


def dinov2_space(path, *, batch_size: int = 64, device: Device = "cpu", progress=False) -> FeatureSpace:
    """The class token after the last norm, of images at 224 x 224 (bicubic, antialiased).

    Source:
        Stein et al. 2023, which takes ViT-L/14; the size is that of the weights given.
    """
    from guided_diffusion_vae.autoencoders.foundation import load_foundation

    if not path:
        raise UserError("--features dinov2 needs --dinov2_path: transformers' folder or timm's file of its weights")
    try:
        model = load_foundation("dinov2", path).to(device)
    except UserError as error:
        said = str(error).replace("--vf_path", "--dinov2_path").replace("--use_vf dinov2", "--features dinov2")
        raise UserError(said.replace("; or give --use_vf none", "")) from error

    @th.inference_mode()
    def extract(batch: Batch) -> dict[str, np.ndarray]:
        return {"pool": th.cat([token(images) for images in _seen(batch, batch_size, progress)]).numpy()}

    def token(images: np.ndarray) -> th.Tensor:
        x = _planes(images).to(device) / 255
        x = F.interpolate(x, (DINOV2_SIZE, DINOV2_SIZE), mode="bicubic", antialias=True).clamp(0, 1)
        return model.model((x - model.mean) / model.std).last_hidden_state[:, 0].cpu()

    state = hashlib.sha256()
    for name, value in sorted(model.model.state_dict().items()):
        state.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return FeatureSpace("dinov2", state.hexdigest()[:16], extract, f"DINOv2's class token, {path}", size=DINOV2_SIZE)


# ---- images ----------------------------------------------------------------------------------------------------------


def can_learn_users(batch: Batch) -> bool:
    """Whether there are labels, of two classes at least, with enough images of each."""
    counts = np.unique(batch.labels, return_counts=True)[1] if batch.labels is not None else np.zeros(0)
    return len(counts) > 1 and counts.min() >= FEWEST


def every_second(labels: np.ndarray) -> np.ndarray:
    """(N,) bool: the second, fourth, ... image of every class."""
    order = np.argsort(labels, kind="stable")
    counts = np.unique(labels, return_counts=True)[1]
    place = np.concatenate([np.arange(count) for count in counts])  # within the class
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order] = place % 2 == 1
    return chosen


def _seen(batch: Batch, batch_size: int, progress: bool) -> Iterator[np.ndarray]:
    with tqdm(total=len(batch), desc=batch.flag, unit="image", disable=None if progress else True) as bar:
        for images in batch.iterate(batch_size):
            yield images
            bar.update(len(images))


def _planes(images: np.ndarray) -> th.Tensor:
    """(N, H, W, 3) as float32 (N, 3, H, W), still 0..255."""
    return th.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()


@th.inference_mode()
def _judged(judge: UserClassifier, images: np.ndarray) -> tuple[th.Tensor, th.Tensor]:
    features = judge.embed(to_input(images))
    return features, judge.head(F.relu(features))


# ---- features kept in a folder ---------------------------------------------------------------------------------------


def extracted(space: FeatureSpace, batch: Batch, cache_dir="") -> dict[str, Any]:
    """The features of a batch, from the cache if they are there, else into it; without a folder nothing is kept."""
    if not cache_dir:
        return space.extract(batch)
    key = hashlib.sha256(f"{VERSION} {space.name} {space.fingerprint} {batch.digest}".encode()).hexdigest()[:32]
    path = Path(cache_dir) / f"{space.name}-{key}.npz"
    found = _read_cache(path, len(batch))
    if found is None:
        found = space.extract(batch)
        data = io.BytesIO()
        np.savez(data, **found)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as handle:
            handle.write(data.getbuffer())
    return found


def _read_cache(path: Path, count: int) -> dict[str, Any] | None:
    """What was kept; None if it is not there, damaged or of another number of images."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
    whole = "pool" in found and all(len(a) == count and np.isfinite(a).all() for a in found.values())
    return found if whole else None
