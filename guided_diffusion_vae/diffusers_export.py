"""A trained model as a folder that diffusers loads: network, autoencoder, scheduler, pipeline, and a model card.

Nothing in it tells where the run's files lay.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from . import dist_util
from .assembly import NETWORK_SECTIONS, create_process
from .autoencoders.layouts import save_diffusers
from .checkpoint import SaveError, atomic_write
from .config import Run, UserError, plain
from .diffusers_card import Facts, card, measured
from .diffusers_process import scheduler_of, time_scale
from .diffusers_unet import to_diffusers, unet_config
from .dit import SIZES, LightningDiT
from .flow_matching import FlowMatching
from .trained import Trained
from .unet import UNetModel

INDEX, PIPELINE, SHIM = "model_index.json", "SpectrogramPipeline", "lightning_dit"
DIT_CODE = "from guided_diffusion_vae.diffusers_dit import LightningDiTModel  # pip install guided_diffusion_vae\n"
DIT_OPTIONS = "use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "learn_sigma"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Exporting a model to diffusers."""

    model_path: str = ""  # the model*.pt or ema_*.pt to export, or its folder; run.yaml there supplies all other flags
    out_dir: str = "exported"  # a new folder
    report: str = ""  # what was measured, for the model card: a report.json, its folder, or that of the samples


def refuse_used(out_dir: str) -> None:
    """Raise if a folder is there already, for what lies in it may have been edited, or if several would write it.

    Raises:
        UserError: names the flag, or the launcher.
    """
    if dist_util.world_size() > 1:
        raise UserError(f"{dist_util.world_size()} processes would write one folder: start it without mpiexec or srun")
    place = Path(out_dir)
    if not out_dir or (place.exists() and (not place.is_dir() or any(place.iterdir()))):
        raise UserError(f"--out_dir {out_dir or '(empty)'} is there already: give the name of a new folder")


def export(trained: Trained, run: Run, settings: dict, record: dict, config: ExportConfig) -> None:
    """Write the folder, whole or not at all.

    Args:
        run: of the model, in float32. settings, record: of its `run.yaml`.
    Raises:
        UserError: the folder is there; what diffusers cannot express; no such report. Nothing is written.
    """
    from diffusers import __version__

    refuse_used(config.out_dir)
    model: Any = trained.model
    vae = trained.vae
    model.to("cpu")
    process = create_process(run.replace(timestep_respacing=""), vae)
    names = trained.class_names if run.class_cond else None
    scheduler = scheduler_of(process, clip_sample=vae.is_pixel)
    network, part = _network(run, model, names)
    guided = names is not None and model.class_dropout_prob > 0
    recipe = plain({field.name: getattr(run, field.name) for section in NETWORK_SECTIONS for field in fields(section)})
    counts = record.get("images_per_user") or {}
    facts = Facts(
        name=Path(config.out_dir).resolve().name,
        weights=Path(config.model_path).name,
        settings=settings,
        recipe={name: value for name, value in recipe.items() if value != run.defaults[name]},
        network=run.network,
        process=run.process,
        class_names=names,
        images_per_user=counts,
        image_size=run.image_size,
        latent=vae.latent_shape(run.image_size),
        parameters=sum(p.numel() for p in model.parameters()),
        vae=not vae.is_pixel,
        guided=guided,
        measured=measured(config.report),
    )
    index = {
        "_class_name": ["pipeline", PIPELINE],
        "_diffusers_version": __version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", "UNet2DModel"] if part == "unet" else [None, None],
        "transformer": [SHIM, "LightningDiTModel"] if part == "transformer" else [None, None],
        "vae": [None, None] if vae.is_pixel else ["diffusers", "AutoencoderKL"],
        "class_names": names,
        "null_label": model.null_label if guided else None,
        "flow": isinstance(process, FlowMatching),
        "time_scale": time_scale(process),
        "training": {"settings": recipe, "images_per_user": counts, "autoencoder": vae.fingerprint},
    }
    with whole_folder(Path(config.out_dir)) as folder:
        network.save_pretrained(folder / part)
        scheduler.save_pretrained(folder / "scheduler")
        if part == "transformer":
            (folder / part / f"{SHIM}.py").write_text(DIT_CODE)
        if not vae.is_pixel:
            scale = vae.latent_scale
            save_diffusers(vae.vae, folder / "vae", scale=scale.scale, shift=scale.shift, image_size=run.image_size)
        code = resources.files("guided_diffusion_vae") / "assets" / "diffusers_pipeline.py"
        (folder / "pipeline.py").write_bytes(code.read_bytes())
        with atomic_write(folder / INDEX) as handle:
            handle.write(json.dumps(index, indent=2, ensure_ascii=False).encode())
        with atomic_write(folder / "README.md") as handle:
            handle.write(card(facts).encode())


def _network(run: Run, model: UNetModel | LightningDiT, names: list[str] | None):
    """The network as a component of diffusers, and its folder's name."""
    if isinstance(model, UNetModel):
        from diffusers import UNet2DModel

        network = UNet2DModel(**unet_config(model))
        network.load_state_dict(to_diffusers(model))
        return network.eval(), "unet"
    from .diffusers_dit import LightningDiTModel

    options = {**SIZES[run.model_type], **{name: getattr(run, name) for name in DIT_OPTIONS}}
    options |= {"num_classes": len(names) if names else 0, "class_dropout_prob": model.class_dropout_prob}
    options |= {"keep_sigma": model.keep_sigma}
    network = LightningDiTModel(sample_size=model.input_size, in_channels=model.in_channels, options=options)
    network.network.load_state_dict(model.state_dict())
    return network.eval(), "transformer"


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill that appears under `path` only if the block ends without an error.

    Raises:
        SaveError: the disk is full, or nothing can be written there.
    """
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()  # empty: see `refuse_used`
        temporary.rename(path)
    except SaveError:
        raise
    except (OSError, SafetensorError) as error:
        raise SaveError(f"cannot write {path}: {error}; nothing of it is left. Choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
