"""The README's commands do what it says: each is run as it is written, on a few people and for a few steps."""

import re
import shlex

import pytest
from helpers import ROOT, record_walks, script

from guided_diffusion_vae.config import read_yaml

SMALLER = {
    "simulate_microdoppler.py": "--num_users 8 --train_images 6 --val_images 1 --test_images 2",
    "image_train_vae.py": "--max_steps 2 --lr_anneal_steps 0 --num_channels 32 --batch_size 2 --sample_interval 0",
    "image_sample_vae.py": "--num_samples_per_user 3 --num_steps 2",
    "latent_extract.py": "",
    "run_pipeline.py": "--max_steps 2 --lr_anneal_steps 0 --batch_size 2 --num_samples_per_user 2 --num_steps 2",
    "evaluate_samples.py": "--judge_epochs 1",
    "validate.py": "--judge_epochs 1 --seeds 1",
    "gallery.py": "",
    "export_model.py": "",
    "import_model.py": "",
    "augmentation_study.py": "--ks 1 --epochs 1 --seeds 1",
    "make_reference.py": "",
    "evaluator.py": "",
    "classifier_train_vae.py": "--iterations 2 --batch_size 2 --eval_interval 1",
    "posthoc_ema.py": "",
    "image_nll_vae.py": "--num_samples 2 --batch_size 2 --timestep_respacing 4",
    "import_radar.py": "",
    "check_vae.py": "--judge_epochs 0",  # who would need four training images of everybody
    "vae_train.py": "--max_steps 2 --batch_size 1",
    "vae_test.py": "",
    "vae_infer.py": "--n 2",
}


def commands(text):
    """(ranks, script, flags) of every command in code blocks, in code spans (also over a line's end), or after `#`."""
    text = text.replace("\n#", "\n")
    for found in re.finditer(
        r"(mpiexec -n 2 )?python (?:scripts|evaluations)/(\w+\.py)((?: [^`\n]+|\n--[^`\n]+)*)", text
    ):
        yield 2 if found[1] else 1, found[2], shlex.split(found[3])


def walk(document, tmp_path):
    """Run a document's commands in a small world; the names of their scripts."""
    done = []
    for ranks, name, flags in commands((ROOT / document).read_text()):
        for word, place in {"DATA": "data", "RECORDINGS": "recordings", "runs/": "runs/"}.items():
            flags = [flag.replace(word, f"{tmp_path}/{place}") for flag in flags]
        flags = [re.sub(r"_\d{6}\.pt", "_000002.pt", re.sub(r"samples_248x", "samples_24x", flag)) for flag in flags]
        if name == "import_radar.py" and (tmp_path / "data").exists():  # simulated ones, which it would refuse
            flags += ["--out_dir", f"{tmp_path}/imported"]
        if name == "check_vae.py":
            flags += ["--report_dir", f"{tmp_path}/runs/check_vae"]
        if name == "gallery.py":  # which would serve for ever
            flags += ["--out", f"{tmp_path}/runs/gallery.html"]
        script(name, *flags, *SMALLER[name].split(), ranks=ranks)
        done.append(name)
    return set(done)


def test_the_readme_from_people_to_report(tmp_path):
    """Then the pages on sampling and on diffusers, which go on from there."""
    record_walks(tmp_path / "recordings", ["user_00", "user_01"], ["day1", "day2", "day3"])
    script("simulate_microdoppler.py", "--out_dir", tmp_path / "data", *SMALLER["simulate_microdoppler.py"].split())
    walked = [walk(page, tmp_path) for page in ("README.md", "docs/sampling.md", "docs/diffusers.md")]
    assert set.union(*walked) == set(SMALLER)
    for promised in (
        "data/manifest.csv",
        "data/train/.latents",
        "imported/train/user_00",
        "imported/overview.png",
        "runs/one/progress.csv",
        "runs/one/samples/grid.png",
        "runs/one/samples/validation/report.html",
        "runs/one/samples/validation/accepted.csv",
        "runs/gallery.html",
        "runs/one/samples/augmentation/study.csv",
        "runs/reference.npz",
        "runs/dit/train/ema_0.99_best.pt",
        "runs/dit/report/report.json",
        "runs/two/samples/png/user_03/micro_doppler_user03_002.png",
        "runs/mine/samples/png/user_03",
        "runs/mine/samples/png/user_07",
        "runs/mine/samples/report/report.json",
        "runs/mine/samples/report/comparison.png",
        "runs/led/samples_3x64x64x3.npz",
        "runs/mine/ema_posthoc0.100_000002.pt",
        "runs/check_vae/worst.png",
        "runs/vae/mine/autoencoder.safetensors",
        "runs/vae/mine/test/report.json",
        "runs/vae/through/grid.png",
    ):
        assert (tmp_path / promised).exists(), promised
    assert not (tmp_path / "runs/mine/samples/png/user_00").exists()


@pytest.mark.slow
def test_the_tutorial(tmp_path):
    assert walk("docs/tutorial.md", tmp_path) >= {"simulate_microdoppler.py", "image_train_vae.py", "run_pipeline.py"}
    for promised in ("data/train/user_00", "runs/one/samples/report/comparison.png", "runs/dit/train/samples/grid.png"):
        assert (tmp_path / promised).exists(), promised


FOREIGN = {"--ours", "--help"}


@pytest.mark.slow
def test_ones_own_recordings(tmp_path):
    record_walks(tmp_path / "recordings", ["user_00", "user_01"], ["day1", "day2", "day3"])
    assert walk("docs/own_data.md", tmp_path) == {
        "import_radar.py",
        "check_vae.py",
        "vae_train.py",
        "image_train_vae.py",
    }
    for promised in ("data/overview.png", "data/axes.yaml", "data/test/user_01", "runs/mine/ema_0.999_000002.pt"):
        assert (tmp_path / promised).exists(), promised


DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.fixture(scope="module")
def flags_of():
    """The flags that each script's --help shows."""
    return {name: set(re.findall(r"--\w+", script(name, "--help").stdout)) for name in SMALLER}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_flags_in_documents_exist(document, flags_of):
    """Behind a script's name they are its own; alone, as `--flag`, those of any."""
    text = document.read_text()
    for name, flags in re.findall(r"(?:scripts|evaluations)/(\w+\.py)((?: [^`\n]+| \\\n)*)", text):
        unknown = set(re.findall(r"(--\w+)", flags)) - flags_of.get(name, set())
        assert not unknown or name not in flags_of, (name, unknown)
    alone = {flag for code in re.findall(r"`(--[^`]+)`", text) for flag in re.findall(r"--\w+", code)}
    assert alone <= set.union(*flags_of.values(), FOREIGN), alone - set.union(*flags_of.values(), FOREIGN)


def test_every_script_is_in_the_readme():
    commands = {path.name for path in (ROOT / "scripts").glob("*.py")} | {"evaluator.py", "make_reference.py"}
    assert commands == set(SMALLER)


RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_command(recipe):
    """The command in its first lines reads this recipe, without an unknown or unreadable setting."""
    found = commands("\n".join(recipe.read_text().splitlines()[:6]))
    ((name, flags),) = [(name, flags) for _, name, flags in found if f"configs/{recipe.name}" in flags]
    words = dict(zip(flags[::2], flags[1::2], strict=True))
    if name != "run_pipeline.py":  # the others' dry runs look at the data, which are the reader's
        words = {flag: word for flag, word in words.items() if flag not in ("--data_dir", "--data_root")}
    printed = script(name, *(part for pair in words.items() for part in pair), "--dry_run", "True").stdout
    for key in read_yaml(recipe):
        assert re.search(rf"^{key}: ", printed, re.M), key


def test_lowmem_is_standard_in_less_memory():
    standard, lowmem = (read_yaml(ROOT / "configs" / f"conditional_{name}.yaml") for name in ("standard", "lowmem"))
    assert lowmem == {**standard, "microbatch": 4, "use_checkpoint": True, "amp": "auto"}
