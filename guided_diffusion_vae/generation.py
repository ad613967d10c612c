"""From a trained model's file to batches of images: what image_sample_vae.py and the Python API share."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch as th

from . import logger
from .assembly import SamplerConfig, create_process, create_sampler, refuse_unfit
from .compiling import compile_network
from .config import Run, create_argparser
from .guidance import GuidanceConfig
from .guides import Guided, with_guides
from .image_datasets import DataConfig
from .noised_classifier import LatentClassifierConfig
from .sample_util import Batch, SamplingConfig, classes_in_turn, sample_batches
from .train_config import TrainConfig
from .trained import NETWORK, Trained, run_of_model
from .vae_wrapper import VAEInterface

SECTIONS = (SamplingConfig, SamplerConfig, GuidanceConfig, LatentClassifierConfig, *NETWORK)
ALIASES = {"users": "user_ids", "cfg_scale": "condition_scale"}


def read_flags(argv: list[str] | None, description: str | None, *more) -> tuple[Run, dict]:
    """The flags of sampling, and those of further sections, with what the model's run says of the rest.

    Raises:
        UserError: see `run_of_model` and `refuse_unfit`.
    """
    about = {"description": description, "aliases": ALIASES, "elsewhere": (DataConfig, TrainConfig)}
    run, record = run_of_model(create_argparser(*SECTIONS, *more, **about), argv)
    refuse_unfit(run)
    return run, record


class Generation(NamedTuple):
    """A model with its guides, its process and its solver, ready to draw."""

    guided: Guided
    process: object
    sampler: Callable[..., th.Tensor]
    vae: VAEInterface

    @property
    def class_names(self) -> list[str]:
        """What a label means."""
        return self.guided.class_names

    def batches(self, run: Run, *, progress: bool = False) -> Iterator[Batch]:
        """The images that the flags ask for, in the order of their numbers. Collective: call on every process.

        Raises:
            UserError: a user that the model does not know.
        """
        labelled = self.guided.labelled
        return sample_batches(
            self.guided.model,
            self.sampler,
            self.vae,
            image_size=run.image_size,
            num_samples=run.section(SamplingConfig).count(self.class_names),
            batch_size=run.batch_size,
            classes=classes_in_turn(run.users, self.class_names) if labelled else None,
            num_classes=len(self.class_names) if labelled else None,
            seed=run.seed,
            per_image_seed=run.per_image_seed,
            progress=progress,
            keep_latents=run.save_latents,
        )


def prepare(run: Run, opened: Trained) -> Generation:
    """Collective: call on every process. Compile, guide and solve as the flags say.

    Raises:
        UserError: see `create_process`, `create_sampler` and `with_guides`.
    """
    if run.compile:
        compile_network(opened.model, logger.warn)
    config = run.section(SamplerConfig)
    process = create_process(run, opened.vae, config)
    guided = with_guides(run, opened.model, process, opened.vae, opened.class_names)
    return Generation(guided, process, create_sampler(config, process, guided.cond_fn), opened.vae)
