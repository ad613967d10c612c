"""From a trained model's file to batches of images: what image_sample_vae.py and the Python API share."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch as th

from . import dist_util, logger
from .assembly import SamplerConfig, create_process, create_sampler, refuse_unfit
from .compiling import compile_network
from .config import Run, create_argparser
from .estimate import duration
from .guidance import GuidanceConfig
from .guides import Guided, with_guides
from .image_datasets import DataConfig
from .noised_classifier import LatentClassifierConfig
from .sample_util import Batch, SamplingConfig, classes_in_turn, named_users, sample_batches
from .train_config import TrainConfig
from .trained import NETWORK, Trained, class_names_of, run_of_model
from .vae_wrapper import VAEInterface

SECTIONS = (SamplingConfig, SamplerConfig, GuidanceConfig, LatentClassifierConfig, *NETWORK)
ALIASES = {"users": "user_ids", "cfg_scale": "condition_scale"}


def read_flags(argv: list[str] | None, description: str | None, *more) -> tuple[Run, dict]:
    """The flags of sampling, and those of further sections, with what the model's run says of the rest.

    Raises:
        UserError: see `run_of_model` and `refuse_unfit`; a user that the model does not know.
    """
    about = {"description": description, "aliases": ALIASES, "elsewhere": (DataConfig, TrainConfig)}
    run, record = run_of_model(create_argparser(*SECTIONS, *more, **about), argv)
    refuse_unfit(run)
    if run.class_cond:
        named_users(run.users, class_names_of(record))
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


class Rehearsal:
    """A network's `forward` that computes the first calls of each shape of x_t, and then repeats their last answer.

    So a walk soon tells how many calls it makes, and from the time of the computed ones how long all would take.
    """

    COMPUTED = 3  # the first of a shape is slower

    def __init__(self, forward: Callable[..., th.Tensor]):
        self.forward, self.answers, self.calls, self.times = forward, {}, defaultdict(int), defaultdict(list)

    def __call__(self, x: th.Tensor, *args, **kwargs) -> th.Tensor:
        shape = tuple(x.shape)
        self.calls[shape] += 1
        if self.calls[shape] <= self.COMPUTED:
            begin = time.perf_counter()
            self.answers[shape] = answer = self.forward(x, *args, **kwargs)
            answer.flatten()[0].item()  # waits for the device
            self.times[shape].append(time.perf_counter() - begin)
        return self.answers[shape]

    @property
    def spared_s(self) -> float:
        """The time of the calls that were not computed."""
        return sum((self.calls[shape] - len(times)) * min(times) for shape, times in self.times.items())


def rehearse(run: Run, opened: Trained) -> str:
    """Collective: call on every process. How long sampling would take, by its first batch with a `Rehearsal`.

    The network alone is rehearsed: what guides it, a weaker one or a classifier, is computed at every step.
    """
    opened.model.forward = rehearsal = Rehearsal(opened.model.forward)
    ready = prepare(run.replace(compile=False), opened)
    begin = time.perf_counter()
    next(ready.batches(run))
    seconds = time.perf_counter() - begin + rehearsal.spared_s
    count, at_once = run.section(SamplingConfig).count(ready.class_names), run.batch_size * dist_util.world_size()
    batches, calls = -(-count // at_once), sum(rehearsal.calls.values())
    least = "at least" if run.sampler == "dopri5" else "about"  # which takes as many steps as the answers ask for
    return (
        f"time: {count} images in batches of {min(count, at_once)}, for each {least} {calls} evaluations of the"
        f" network: {least} {duration(batches * seconds)}, timed on this machine{' without --compile' * run.compile}"
    )
