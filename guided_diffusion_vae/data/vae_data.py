"""What an autoencoder is trained and judged on: the parts of one or several data sets, with the channels it wants."""

import random
from dataclasses import dataclass

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from .. import dist_util
from ..config import UserError, refuse_below
from ..image_datasets import who
from .image_folder import image_from_pixels, read_rgb
from .plain_datasets import PlainDataset, Split, celeba, image_dir, mnist

# microdoppler reads any folder of users; its own name says in a recipe what was trained on
DATASETS = {"celeba": celeba, "mnist": mnist, "image_dir": image_dir, "microdoppler": image_dir}


@dataclass(frozen=True, kw_only=True)
class VAEDataConfig:
    """The images of an autoencoder."""

    dataset: str = "microdoppler"  # microdoppler or image_dir (folders), celeba (folder), mnist (idx files)
    data_root: str = ""  # where they are; several folders with commas. train/, val/, test/ inside are taken as such
    image_size: int = 64  # side of the images; others are scaled, their middle square cut out
    random_crop: bool = False  # train on random squares of the images as they are, instead of scaling them
    limit: int = 0  # use so many images only; 0 = all

    def __post_init__(self):
        if self.dataset not in DATASETS:
            raise UserError(f"--dataset is {self.dataset!r}; choose {', '.join(DATASETS)}")
        refuse_below(self, 1, "image_size")
        if self.limit < 0:
            raise UserError(f"--limit is {self.limit}; give a number of images, or 0 for all")
        if self.random_crop and self.dataset == "mnist":
            raise UserError("--random_crop True needs a folder of images; leave it out for --dataset mnist")

    def load(self, say=print) -> list[PlainDataset]:
        """Every data set that `data_root` names.

        Raises:
            UserError: nothing there, or nothing that can be read.
        """
        roots = [root.strip() for root in self.data_root.split(",")]
        return [DATASETS[self.dataset](root, self.image_size, self.limit, say=say) for root in roots]

    def parts(self, channels: int, *, seed: int, say=print) -> Split:
        """Datasets (not indices) to train, validate and test on; what has no parts of its own is split by the seed."""
        datasets = self.load(say)
        splits = [dataset.split(seed) for dataset in datasets]
        for dataset, split in zip(datasets, splits, strict=True):
            say(describe_parts(dataset, split))
        parts = {}
        for name in Split._fields:
            crops = self.random_crop and name == "train"
            chosen = [Part(d, getattr(split, name), channels) for d, split in zip(datasets, splits, strict=True)]
            parts[name] = ConcatDataset([RandomCrops(part, self.image_size) if crops else part for part in chosen])
        return Split(**parts)

    def rehearse(self, *, seed: int, say=dist_util.print_comment) -> None:
        """What a dry run says of its data, and refuses as the run would; without a data_root, nothing."""
        for dataset in self.load(say) if self.data_root else []:
            say(describe_parts(dataset, dataset.split(seed)))


def describe_parts(dataset: PlainDataset, split: Split) -> str:
    """One line on what was found: how many images of whom, and how many are in each part."""
    counts = ", ".join(f"{len(part)} {name}" for name, part in zip(Split._fields, split, strict=True))
    drawn = [name for name in Split._fields if name not in dataset.parts]
    how = f" ({' and '.join(drawn)} drawn from train by --seed)" if drawn else ""
    return f"{len(dataset)} images of {who(dataset)}; {counts}{how}"


class Part(Dataset):
    """Some images of a data set, float32 (channels, S, S) in [-1, 1]: grey is repeated, colours are averaged."""

    def __init__(self, dataset: PlainDataset, indices: np.ndarray, channels: int):
        self.dataset, self.indices, self.channels = dataset, indices, channels

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place) -> np.ndarray:
        return with_channels(self.dataset[self.indices[place]], self.channels)


class RandomCrops(Dataset):
    """Random squares of a part's images, at the size that the files have; the files are held in memory as bytes.

    Raises:
        UserError: an image that cannot be read, or is smaller than a square.
    """

    def __init__(self, part: Part, size: int):
        self.size, self.channels, self.images = size, part.channels, []
        for path in part.dataset.source[part.indices]:
            image = np.asarray(read_rgb(path))
            if min(image.shape[:2]) < size:
                raise UserError(f"--image_size {size} is larger than {path} ({image.shape[1]} x {image.shape[0]})")
            self.images.append(image)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place) -> np.ndarray:
        image = self.images[place]
        top, left = (random.randrange(side - self.size + 1) for side in image.shape[:2])
        crop = image[top : top + self.size, left : left + self.size]
        return with_channels(image_from_pixels(crop), self.channels)


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """An image (C, H, W) with another number of channels, 1 or 3."""
    if len(image) == channels:
        return image
    return np.repeat(image, channels, axis=0) if len(image) == 1 else image.mean(axis=0, keepdims=True)
