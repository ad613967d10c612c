"""Our networks and loops, made as our own scripts make them; `rivals` has the others.

Ours and the official code get the same flags, weights and batches; diffusers' networks are of equal size.
"""

import contextlib
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch as th

from guided_diffusion_vae import assembly, dist_util, estimate, logger, run_record, train_util, trained
from guided_diffusion_vae.compiling import compile_network
from guided_diffusion_vae.config import create_argparser, parse_run
from guided_diffusion_vae.guidance import GuidanceConfig
from guided_diffusion_vae.image_datasets import DataConfig
from guided_diffusion_vae.noised_classifier import LatentClassifierConfig
from guided_diffusion_vae.resample import create_named_schedule_sampler
from guided_diffusion_vae.sample_util import SamplingConfig
from guided_diffusion_vae.stages import words_of
from guided_diffusion_vae.vae_wrapper import VAEConfig, load_vae

TRAINING = (DataConfig, train_util.TrainConfig, *trained.NETWORK)
SAMPLING = (SamplingConfig, assembly.SamplerConfig, GuidanceConfig, LatentClassifierConfig, *trained.NETWORK)
LOG_INTERVAL = 10  # steps between rows of our log, for which the losses leave the device; its default
USERS = 31
NEVER = 10**9


@dataclass(frozen=True)
class Case:
    """A network, by our flags, and the batch that it sees."""

    name: str
    batch: int
    flags: dict = field(default_factory=dict)

    @cached_property
    def run(self):
        """The resolved flags."""
        return run_of(TRAINING, {**self.flags, "batch_size": self.batch})

    @cached_property
    def vae(self):
        return load_vae(self.run.section(VAEConfig)).to(dist_util.dev())

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, h, w) of what the network sees."""
        return (self.batch, *self.vae.latent_shape(self.run.image_size))

    def data(self, seed: int = 0) -> tuple[th.Tensor, dict]:
        """A batch of unit variance and, if the network is conditional, its labels; on the device."""
        rng = th.Generator().manual_seed(seed)
        batch, labels = th.randn(self.shape, generator=rng), th.randint(USERS, (self.batch,), generator=rng)
        cond = {"y": labels.to(dist_util.dev())} if self.run.class_cond else {}
        return batch.to(dist_util.dev()), cond

    @cached_property
    def weights(self) -> dict[str, th.Tensor]:
        """Ours and the official code's, none of which are zero: a fresh network predicts nothing else."""
        assert self.vae  # opened before, for that draws random numbers, too
        th.manual_seed(0)
        model = our_network(self)
        for param in model.parameters():
            if param.requires_grad and not param.any():
                th.nn.init.normal_(param, std=0.02)
        return model.state_dict()

    def forward_flops(self) -> int:
        """Operations of one forward pass of the batch, two for each multiply-add."""
        model, users = our_network(self, device="meta"), USERS if self.run.class_cond else None
        return self.batch * estimate.forward_flops(model, self.shape[1:], users)

    def smaller(self, batch: int) -> "Case":
        """The same network and weights with at most so many images."""
        found = Case(self.name, min(batch, self.batch), self.flags)
        found.__dict__["weights"] = self.weights
        return found

    def about(self) -> dict:
        """What is said of the network beside a result."""
        return {"batch": self.batch, "shape": list(self.shape[1:])}


def run_of(sections, flags: dict):
    """A run of these sections from flags by name."""
    return parse_run(create_argparser(*sections, description=""), words_of(flags))


def unet(*, image_size=64, channels=64, mult="1,2,2", attention=8, blocks=2, vae_path="microdoppler-f4") -> dict:
    """Flags of a U-Net that is measured: at `attention` pixels a side it attends, in heads of 32."""
    flags = {"vae_path": vae_path, "image_size": image_size, "num_channels": channels, "num_res_blocks": blocks}
    return flags | {"channel_mult": mult, "attention_resolutions": attention, "num_head_channels": 32}


def start() -> None:
    """What a script does before it makes anything: the process group, and a log that nobody reads."""
    dist_util.setup_dist()
    logger.configure(dir=tempfile.mkdtemp(), format_strs=[])


# ---- ours


def our_network(case: Case, run=None, device=None) -> th.nn.Module:
    """Fresh, by the case's flags or those of another run; on the device, whose random numbers are quicker."""
    vae = case.vae  # opened here, not on another device
    with th.device(device or dist_util.dev()):
        return assembly.create_network(run or case.run, vae, num_classes=USERS)


class OurTraining:
    """Our training loop, step by step, with draws in upstream's order unless there is a seed."""

    def __init__(self, case: Case, *, seed: int | None = None, weights=None, **flags):
        run = run_of(TRAINING, {**case.flags, "batch_size": case.batch, "ema_rate": 0.999, **flags})
        model, process = our_network(case, run), assembly.create_process(run, case.vae)
        model.load_state_dict(weights or case.weights)
        settings = asdict(run.section(train_util.TrainConfig)) | {"seed": seed}
        settings |= {"save_interval": NEVER, "log_interval": NEVER}
        settings["schedule_sampler"] = create_named_schedule_sampler(settings["schedule_sampler"], process)
        self.loop = train_util.TrainLoop(model=model, diffusion=process, data=None, use_fp16=run.use_fp16, **settings)
        self.batch = case.data()

    def step(self) -> None:
        """One update, with what the loop logs about it."""
        self.loop.run_step(*self.batch)
        self.loop.step += 1
        if self.loop.step % LOG_INTERVAL == 0:
            for t, losses in self.loop.unlogged:
                train_util.log_loss_dict(self.loop.diffusion, t, losses)
            self.loop.unlogged.clear()
            logger.dumpkvs()

    def gradient(self):
        """See `loss_and_gradient`."""
        return loss_and_gradient(self.loop, self.batch)


def our_sampler(case: Case, steps: int, folder, *, sampler: str = "p_sample", **flags):
    """() -> samples, by the model as image_sample_vae.py opens it from a checkpoint in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"user_{i:02d}" for i in range(USERS)]
    th.save(case.weights, folder / "model000000.pt")
    run_record.save_run(case.run, folder, class_names=names, autoencoder=case.vae.fingerprint)
    words = words_of({"model_path": folder / "model000000.pt", "sampler": sampler, "num_steps": steps, **flags})
    run, record = trained.run_of_model(create_argparser(*SAMPLING, description=""), words)
    run = run.replace(clip_denoised=False)
    model, vae, _ = trained.open_model(run, record)
    if run.compile:
        compile_network(model, print)
    config = run.section(assembly.SamplerConfig)
    walk = assembly.create_sampler(config, assembly.create_process(run, vae, config))
    noise, cond = case.data(1)

    def sample():
        th.manual_seed(0)
        how = {"noise": noise, "noise_like": None, "model_kwargs": cond, "device": dist_util.dev(), "progress": False}
        return walk(model, tuple(noise.shape), **how)

    return sample


# ---- are they the same?


def loss_and_gradient(loop, batch) -> tuple[th.Tensor, th.Tensor]:
    """(losses of a batch (N,), all gradients in a row) of a training loop, ours or the official, for the same draws."""
    kept, usual = [], loop.diffusion.training_losses

    def watched(*args, **kwargs):
        kept.append(usual(*args, **kwargs))
        return kept[-1]

    loop.diffusion.training_losses = watched
    try:
        th.manual_seed(0)
        np.random.seed(0)
        loop.forward_backward(*batch)
    finally:
        loop.diffusion.training_losses = usual
    trainer = loop.mp_trainer
    scale = 2**trainer.lg_loss_scale if trainer.use_fp16 else 1.0
    gradients = [param.grad.float().flatten() / scale for param in loop.model.parameters() if param.grad is not None]
    return kept[0]["loss"].detach().float(), th.cat(gradients)


def deviation(found: th.Tensor, reference: th.Tensor) -> float:
    """Largest difference, as a share of the largest number of the reference."""
    found, reference = found.detach().float().cpu(), reference.detach().float().cpu()
    return float((found - reference).abs().max() / reference.abs().max())


def parameters(model: th.nn.Module) -> int:
    """How many numbers a network learns."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def sizes(ours: th.nn.Module, rival: th.nn.Module) -> dict:
    """What is said beside a result of two networks that are not the same."""
    counts = [parameters(ours), parameters(rival)]
    return {"parameters": counts, "note": "{:.2f} M against {:.2f} M parameters".format(*(n / 1e6 for n in counts))}


@contextlib.contextmanager
def scratch():
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
