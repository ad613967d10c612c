"""The walls of the house: a room imports from its own floor or a lower one, and nothing goes round in a circle."""

import ast
import re
from pathlib import Path

import guided_diffusion_vae

PACKAGE = Path(guided_diffusion_vae.__file__).parent
FLOORS = [
    {
        *("config", "logger", "log_formats", "checkpoint", "dist_util", "run_state", "run_record", "stop_signals"),
        *("folder_lock", "quick_help", "machine_facts", "assets.diffusers_pipeline"),
    },
    {
        *("winograd", "linear", "packing", "channels_last", "nn", "optimizer", "losses"),
        *("gaussian_diffusion", "respace", "resample"),
        *("flow_matching", "guidance", "samplers", "denoiser", "score_matching"),
    },
    {"compiling", "fp16_util", "unet", "dit", "model_flags", "diffusers_unet", "diffusers_dit"},
    {
        *("autoencoders.base", "autoencoders.conv", "autoencoders.kl", "autoencoders.layouts"),
        *("autoencoders.perceptual", "autoencoders.adversarial", "autoencoders.foundation", "autoencoders.objectives"),
        *("autoencoders.ldm_config", "vae_wrapper", "latent_transport"),
    },
    {
        *("data.spectrogram", "data.gait", "data.microdoppler", "data.image_folder", "image_datasets"),
        *("data.plain_datasets", "data.vae_data", "data.stream"),
        *("data.latent_cache", "data.latent_shards", "data.latent_extract"),
        *("data.radar_files", "data.radar_sessions", "data.radar_import"),
    },
    {
        *("train_util", "train_config", "sharding", "validation", "sample_util", "likelihood", "estimate"),
        *("vae_tasks", "vae_train_util", "vae_infer_util", "posthoc_ema", "plotting", "curves", "pictures"),
    },
    {
        "script_util",
        "assembly",
        "noised_classifier",
        "trained",
        "generation",
        "api",
        "guides",
        "pipeline",
        "stages",
        "cli",
        "doctor",
        *("diffusers_process", "diffusers_card", "diffusers_export", "diffusers_import"),
    },
]
FLOOR_OF = {room: level for level, floor in enumerate(FLOORS) for room in floor}
MATHS = FLOORS[1]


def rooms():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


def imports(room, path):
    """The rooms that a file imports, also inside functions, by relative or absolute name."""
    package, here = PACKAGE.name, [PACKAGE.name, *room.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [(f"{base}.{alias.name}", base) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [(alias.name,) for alias in node.names]
        for candidates in names:
            used = (name.removeprefix(f"{package}.") for name in candidates if name.startswith(f"{package}."))
            yield from [name for name in used if name in FLOOR_OF][:1]


def arrows():
    return [(room, used) for room, path in rooms() for used in imports(room, path)]


def test_every_room_is_on_the_plan():
    assert {room for room, _ in rooms()} == set(FLOOR_OF)


def test_arrows_are_seen(tmp_path):
    text = """
from . import nn
from .config import UserError
from ..respace import SpacedDiffusion
import guided_diffusion_vae.losses
def inside():
    from guided_diffusion_vae.autoencoders.kl import KLConfig
    from guided_diffusion_vae import unet
    import torch
"""
    (tmp_path / "room.py").write_text(text)
    assert list(imports("room", tmp_path / "room.py")) == ["nn", "config", "losses", "autoencoders.kl", "unet"]
    deeper = ["respace", "losses", "autoencoders.kl", "unet"]
    assert list(imports("data.room", tmp_path / "room.py")) == deeper


def test_no_import_climbs():
    up = [f"{room} -> {used}" for room, used in arrows() if FLOOR_OF[used] > FLOOR_OF[room]]
    assert not up, up


def test_no_import_goes_round_in_a_circle():
    edges = {room: set() for room in FLOOR_OF}
    for room, used in arrows():
        edges[room].add(used)
    done, path = set(), []

    def visit(room):
        assert room not in path, " -> ".join([*path[path.index(room) :], room])
        if room not in done:
            path.append(room)
            for used in edges[room]:
                visit(used)
            done.add(path.pop())

    for room in FLOOR_OF:
        visit(room)


def test_the_maths_do_no_io():
    for room, path in rooms():
        if room in MATHS:
            text = path.read_text()
            assert not any(word in text for word in ("open(", "print(", "logger", "cuda")), room


def test_evaluations_are_not_imported_by_the_package():
    assert not [room for room, path in rooms() if re.search(r"(from|import) +evaluations", path.read_text())]


def test_scripts_are_tables_of_contents():
    """No class but configuration, no tensor arithmetic, at most a page and a half."""
    for path in sorted((PACKAGE.parent / "scripts").glob("*.py")):
        tree = ast.parse(path.read_text())
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        assert all(node.decorator_list for node in classes), path.name
        assert len(path.read_text().splitlines()) <= 110, path.name
