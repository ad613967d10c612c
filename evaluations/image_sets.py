"""What is compared: real images from folders, generated ones from the sampler's .npz or its folder of PNGs.

All sets are numbered by the class list of the real training folder. Real images are brought to the size of the
generated ones (centre cropped, then averaged over the area of a pixel), as the generator saw them.
"""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data.image_folder import ImageFolder, list_files, list_images, read_rgb, refuse
from guided_diffusion_vae.data.latent_cache import drop_bad_images
from guided_diffusion_vae.image_datasets import PARTS
from guided_diffusion_vae.sample_util import read_manifest

from .npz import read_member
from .value_range import refuse_unit_range, remedy_of

LABELS = "an .npz with labels in arr_1, or a folder with one subfolder a user"  # whom samples show


class ImageSet(NamedTuple):
    """Images uint8 (N, H, W, 3), the class of each (N,), and the names of the classes; both None if unlabelled."""

    pixels: np.ndarray
    labels: Any  # np.ndarray; those who need it ask for labelled sets
    class_names: Any  # list[str]
    files: list[str] | None = None  # of each image, relative to its folder

    def joined(self, other: "ImageSet") -> "ImageSet":
        """The images of both, in these numbers."""
        pixels, labels = (np.concatenate([getattr(s, name) for s in (self, other)]) for name in ("pixels", "labels"))
        return ImageSet(pixels, labels, self.class_names)

    def take(self, index) -> "ImageSet":
        """The images at these places."""
        labels = None if self.labels is None else self.labels[index]
        files = None if self.files is None else np.array(self.files, dtype=object)[index].tolist()
        return ImageSet(self.pixels[index], labels, self.class_names, files)


def read_folder(
    folder, flag: str, size: tuple[int, int] | None = None, *, skip_bad_images: bool = False, say=print
) -> ImageSet:
    """Read a folder of images, one subfolder a user (or upstream's `name_rest.png`).

    Args:
        flag: what an error calls the folder.
        size: (height, width) that all images are brought to; None takes the first image's.
        skip_bad_images: leave out images that cannot be read, and say which, instead of refusing.
    Raises:
        UserError: no folder, no images, some that cannot be read, or a folder of splits.
    """
    found = list_folder(folder, flag)
    images, bad, sizes = [], [], []
    try:
        if skip_bad_images:
            found = drop_bad_images(found, lambda line: say(f"{flag}: {line}"))
        for path in found.paths:
            try:
                image = read_rgb(path)
            except UserError as error:
                bad.append(str(error))
                continue
            own = image.height, image.width
            size = size or own
            sizes += [own] if own != size else []
            images.append(np.asarray(ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BOX)))
        refuse(bad, len(found.paths))
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if sizes and size:
        (height, width), (rows, columns) = sizes[0], size
        count = f"{len(sizes)} of {len(images)} images"
        say(f"{flag}: {count} have another size, such as {height} x {width}: brought to {rows} x {columns}")
    files = [Path(path).relative_to(folder).as_posix() for path in found.paths]
    return ImageSet(np.stack(images), np.array(found.labels), found.class_names, files)


def list_folder(folder, flag: str) -> ImageFolder:
    """The images of a folder, one subfolder a user (or upstream's `name_rest.png`); none is read.

    Args:
        flag: what an error calls the folder.
    Raises:
        UserError: no folder, no images, or a folder of splits.
    """
    try:
        found = list_images(folder)
    except UserError as error:
        raise UserError(str(error).replace("--data_dir", flag)) from error
    refuse_splits(folder, flag)
    return found


def refuse_splits(folder, flag: str) -> None:
    """Raise if there are two or more folders such as train and test in it, which are neither users nor one set."""
    found = [name for name in PARTS if (Path(folder) / name).is_dir()]
    if len(found) > 1:
        place = Path(folder) / found[-1 if flag == "--heldout_dir" else 0]
        raise UserError(f"{flag} {folder} holds {', '.join(found)}, which are not one set: give one, such as {place}")


def read_real(real_dir, heldout_dir, size: tuple[int, int], **options) -> tuple[ImageSet, ImageSet]:
    """The images that a generator learned from, and the held-out ones under the numbers of the same users.

    Args:
        options: see `read_folder`.
    Raises:
        UserError: see `read_folder` and `renumber`.
    """
    train = read_folder(real_dir, "--real_dir", size, **options)
    heldout = read_folder(heldout_dir, "--heldout_dir", size, **options)
    return train, renumber(heldout, train.class_names, "--heldout_dir")


def read_sets(run) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training, held-out and generated images of one size, as `--real_dir`, `--heldout_dir` and `--samples` name them.

    Raises:
        UserError: see `read_samples`, `read_folder` and `renumber`.
    """
    skip = {"skip_bad_images": run.skip_bad_images}
    samples = read_samples(run.samples, **skip)
    train, heldout = read_real(run.real_dir, run.heldout_dir, samples.pixels.shape[1:3], **skip)
    return train, heldout, renumber(samples, train.class_names, "--samples")


def read_samples(path, **options) -> ImageSet:
    """Read generated images: an .npz with arr_0 (and arr_1, their labels), or a folder of images.

    Args:
        options: of a folder, see `read_folder`.
    Raises:
        UserError: neither, or arr_0 is not uint8 (N, H, W, 3), or the labels do not fit it.
    """
    if not path:
        raise UserError("--samples is empty; give the .npz or the folder of PNGs that image_sample_vae.py wrote")
    if Path(path).is_dir():
        return read_folder(pngs_of(Path(path), "--samples"), "--samples", **options)
    pixels, labels = _read_npz(path)
    _refuse_pixels(pixels, f"--samples {path}")
    if labels is not None and (labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(
            f"--samples {path}: arr_1 is {labels.dtype} {labels.shape}; it must be one integer an image ({len(pixels)})"
        )
    return ImageSet(pixels, labels, None)


def _refuse_pixels(pixels: np.ndarray, at: str) -> None:
    """Raise if an array is not uint8 (N, H, W, 3), with the remedy where it can be told."""
    said = f"{at}: arr_0 is {pixels.dtype} {pixels.shape}"
    if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise UserError(said + remedy_of(pixels.shape))
    if pixels.dtype.kind == "f":
        refuse_unit_range([pixels], pixels.dtype, at)
    if pixels.dtype != np.uint8:
        raise UserError(f"{said}; it must be uint8: write it again as x.round().clip(0, 255).astype('uint8')")


def pngs_of(folder: Path, flag: str) -> Path:
    """Where the images of a folder of samples lie; the sampler's own holds grids beside them, which are none.

    Args:
        flag: what an error calls the folder.
    Raises:
        UserError: the sampler wrote no PNGs; some of its last run's are gone, or there are others beside them.
    """
    inner, listed = folder / "png", {row["file"] for row in read_manifest(folder)}
    found = {path.relative_to(folder).as_posix() for path in list_files(inner)} if inner.is_dir() else set()
    if listed and not found & listed:
        raise UserError(f"{flag} {folder} has none of the PNGs of its manifest.csv: give the samples_*.npz in it")
    if listed - found:
        raise UserError(
            f"{flag} {folder} lacks {len(listed - found)} of the PNGs of its manifest.csv, such as"
            f" {min(listed - found)}: give the samples_*.npz in it, or sample again"
        )
    if listed and found - listed:
        raise UserError(
            f"{flag} {folder} has {len(found - listed)} PNGs that are not in its manifest.csv, such as"
            f" {min(found - listed)}: remove what another run left, or give the samples_*.npz in it"
        )
    return inner if inner.is_dir() else folder


def _read_npz(path) -> tuple[np.ndarray, np.ndarray | None]:
    at = f"--samples {path}"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in names:
                has = f"has {', '.join(names)}" if names else "is empty"
                raise UserError(f"{at} {has}, but no arr_0: the images, uint8 (N, height, width, 3)")
            pixels = read_member(archive, "arr_0", at)
            labels = read_member(archive, "arr_1", at) if "arr_1" in names else None
            return pixels, labels
    except UserError:  # a ValueError, too
        raise
    except FileNotFoundError as error:
        raise UserError(f"{at} does not exist") from error
    except Exception as error:  # of zipfile, zlib, struct, tokenize, ast and NumPy: no list of theirs is whole
        raise UserError(f"{at} is not a readable .npz file; give that of image_sample_vae.py") from error


def renumber(images: ImageSet, class_names: list[str], flag: str) -> ImageSet:
    """The set with labels that are places in `class_names`; a set whose classes are all unknown is unlabelled.

    Raises:
        UserError: some classes are known and others not, or a label is no place in the list.
    """
    if images.labels is None:
        return images._replace(class_names=None)
    if images.class_names is None:
        low, high = images.labels.min(), images.labels.max()
        if low < 0 or high >= len(class_names):
            raise UserError(f"{flag} has labels {low} to {high}, but --real_dir has {len(class_names)} users")
        return images._replace(class_names=class_names)
    unknown = [name for name in images.class_names if name not in class_names]
    if len(unknown) == len(images.class_names):
        return images._replace(labels=None, class_names=None)
    if unknown:
        raise UserError(f"{flag} has the user {unknown[0]}, who is not in --real_dir ({len(unknown)} such users)")
    place = np.array([class_names.index(name) for name in images.class_names])
    return images._replace(labels=place[images.labels], class_names=class_names)


def shuffle_pixels(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same colours in another order, in every image (N, H, W, 3) another."""
    flat = pixels.reshape(len(pixels), -1, 3)
    return np.stack([rng.permutation(image) for image in flat]).reshape(pixels.shape)


def beside(samples, name: str) -> Path:
    """The folder for what is said of samples: in the sampler's folder, or where the .npz lies."""
    given = Path(samples)
    return (given if (given / "png").is_dir() else given.parent) / name
