"""What is released: a wheel that is whole, whose version everybody agrees on, and that works where it is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from helpers import ROOT
from test_pipeline import TINY

import guided_diffusion_vae
from guided_diffusion_vae import cli

FOLDERS = ("guided_diffusion_vae", "evaluations", "scripts", "configs", "tests", "benchmarks")


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == guided_diffusion_vae.__version__


# ---- the wheel -------------------------------------------------------------------------------------------------------


def run(*command, cwd, **env):
    words = list(map(str, command))
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=os.environ | env, timeout=600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this tree, which is gone when the tests begin."""
    place = tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, place / "src" / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, place / "src")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    made = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", "wheels", "./src", cwd=place)
    assert made.returncode == 0, made.stderr
    shutil.rmtree(place / "src")
    (found,) = (place / "wheels").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder that the wheel, and nothing else, is installed in."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    put = run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=site)
    assert put.returncode == 0, put.stderr
    return site


@pytest.fixture
def installed(site, tmp_path):
    """Runs a gdvae command of the wheel in an empty folder; returns what it prints."""
    (tmp_path / "empty").mkdir()

    def gdvae(*words):
        program = [sys.executable, site / "bin" / "gdvae"]  # the test's Python, whatever its first line
        done = run(*program, *words, cwd=tmp_path / "empty", PYTHONPATH=str(site), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    return gdvae


@pytest.mark.slow
def test_a_wheel_has_the_package_its_data_and_nothing_else(wheel):
    def of(folder, *patterns, inside=""):
        found = (path for pattern in patterns for path in (ROOT / folder).rglob(pattern))
        return {inside + path.relative_to(ROOT).as_posix() for path in found}

    wanted = of("guided_diffusion_vae", "*.py") | of("guided_diffusion_vae/assets", "*.*") | of("evaluations", "*.py")
    wanted |= of("scripts", "*.py", inside="guided_diffusion_vae/")
    wanted |= of("configs", "*.yaml", inside="guided_diffusion_vae/")
    wanted = {name for name in wanted if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        info = f"guided_diffusion_vae-{guided_diffusion_vae.__version__}.dist-info/"
        found = set(archive.namelist())
        assert {name for name in found if not name.startswith(info)} == wanted
        about = Parser().parsestr(archive.read(f"{info}METADATA").decode())
        licence = archive.read(f"{info}licenses/LICENSE").decode()
        points = archive.read(f"{info}entry_points.txt").decode()
    assert "guided_diffusion_vae/assets/microdoppler-f4.safetensors" in wanted
    assert (about["Name"], about["Version"]) == ("guided_diffusion_vae", guided_diffusion_vae.__version__)
    assert about.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert about["Description-Content-Type"] == "text/markdown"
    assert about["Requires-Python"] == ">=3.11"
    assert {"torch>=2.6", "PyYAML>=6.0"} <= set(about.get_all("Requires-Dist"))
    assert licence == (ROOT / "LICENSE").read_text()
    assert "gdvae = guided_diffusion_vae.cli:main" in points.splitlines()


@pytest.mark.slow
def test_commands_of_a_wheel_find_what_they_need(site, installed, tmp_path):
    assert installed("--help") == cli.help_text() + "\n"
    printed = installed("simulate", "--dry_run", "True", "--num_users", "3", "--out_dir", "people")
    assert "\nnum_users: 3\n" in printed and "out_dir: people\n" in printed
    assert "\nmodel: mnist\n" in installed("vae-train", "--config", "vae_mnist.yaml", "--dry_run", "True")
    assert sorted(path.name for path in site.iterdir() if path.suffix != ".dist-info") == [
        *("bin", "evaluations", "guided_diffusion_vae")  # nothing else where other packages are
    ]
    looks = "from guided_diffusion_vae import doctor as d; print(d.ASSET, d.check_asset(d.Facts()).level)"
    looks = run(sys.executable, "-c", looks, cwd=tmp_path / "empty", PYTHONPATH=str(site)).stdout
    assert looks == f"{site}/guided_diffusion_vae/assets/microdoppler-f4.safetensors ok\n"
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.slow
def test_a_wheel_goes_all_the_way(site, installed, tmp_path):
    """People, latents, a training, its samples and their report, all by scripts that lie in the wheel."""
    few = "--num_users 3 --train_images 12 --val_images 4 --test_images 0 --image_size 32 --workers 1".split()
    installed("simulate", *few, "--out_dir", "people")
    flags = ["--data_dir", "people/train", "--val_dir", "people/val", *TINY, "--out_dir", "run"]
    printed = installed("pipeline", *flags, "--dry_run", "True")
    assert re.search("^out_dir: run$", printed, re.MULTILINE) and not (tmp_path / "empty" / "run").exists()
    installed("pipeline", *flags)
    notes = [json.loads(note.read_text()) for note in (tmp_path / "empty" / "run").glob("*.json")]
    scripts = {Path(word) for note in notes for word in note["command"] if word.endswith(".py")}
    assert all(note["done"] for note in notes) and {script.parent for script in scripts} == {
        site / "guided_diffusion_vae" / "scripts"
    }
    assert {script.name for script in scripts} == {
        *("latent_extract.py", "image_train_vae.py", "image_sample_vae.py", "evaluate_samples.py")
    }
    assert (tmp_path / "empty" / "run" / "report" / "report.json").is_file()
    assert len(list((tmp_path / "empty" / "run").rglob("png/*/*.png"))) == 3 * 4
