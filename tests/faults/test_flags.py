"""Flags and files that are not what a script wants, and surroundings that are not what it is used to."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import undisturbed
from helpers import ROOT
from inputs import COMMANDS, FILES, FOLDERS, LIMIT, World, defaults_of, ended

SCRIPTS = pytest.mark.parametrize("script", COMMANDS)
OPTIONAL = {  # they may be empty, or are not read by the command
    *(("image_train_vae.py", "val_dir"), ("latent_extract.py", "val_dir"), ("vae_train.py", "ckpt")),
    *(("classifier_train_vae.py", "val_data_dir"), ("classifier_train_vae.py", "model_path")),
    *(("image_sample_vae.py", "classifier_path"), ("run_pipeline.py", "classifier_path")),
    *(("run_pipeline.py", "heldout_dir"), ("run_pipeline.py", "val_dir"), ("evaluator.py", "vae_path")),
    ("gallery.py", "heldout_dir"),
}
WRONG = {int: ("many", "1.5"), float: ("much",), bool: ("maybe",)}  # words that are none of a type


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def refused(world, script, words, *names, limit=LIMIT):
    """Assert that a script ends with code 2, one line that has these words, and every file as it was."""
    with undisturbed(world.root / "data", world.root / "train", world.root / "things"):
        done = ended(script, words, limit=limit)
    assert done.returncode == 2, (script, words, done.returncode, done.stderr[-2000:])
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), (script, words, done.stderr[-2000:])
    assert all(name in lines[0] for name in names), (script, words, lines[0])


def paths_of(script):
    """The flags of a script that name what is there already."""
    known = defaults_of(script)
    return [flag for flag in (*FOLDERS, *FILES) if flag in known and (script, flag) not in OPTIONAL]


@pytest.mark.fault("{script}: a flag mistyped, a word too many, a recipe that is not there", promise="code 2, one line")
@SCRIPTS
def test_a_slip(script, world, record_property):
    cases = {"--nosuch": [*world.command(script), "--nosuch", "1"], "unknown": [*world.command(script), "--x", "word"]}
    cases |= {"does not exist": [*world.command(script), "--config", "nowhere.yaml"]}
    if flag := next(iter(paths_of(script)), None):
        cases[f"--{flag}"] = world.command(script, **{flag: "/nowhere/at/all"})
    for name, words in cases.items():
        refused(world, script, words, name)
    record_property("tried", len(cases))


@pytest.mark.slow
@pytest.mark.fault(
    "{script}: every folder and file missing, an empty folder, a text, zero bytes, a pickle", promise="code 2, one line"
)
@SCRIPTS
def test_a_path_to_something_else(script, world, record_property):
    things = world.things()
    flags = paths_of(script)
    for flag in flags:
        for thing in things.values():
            refused(world, script, world.command(script, **{flag: thing}))
    record_property("tried", len(flags) * len(things))


@pytest.mark.slow
@pytest.mark.fault("{script}: every flag given a word of another type", promise="code 2, one line that names the flag")
@SCRIPTS
def test_a_word_of_another_type(script, world, record_property):
    tried = 0
    for flag, default in defaults_of(script).items():
        for word in WRONG.get(type(value_of(default)), ()):
            refused(world, script, [*world.command(script), f"--{flag}", word], flag)
            tried += 1
    record_property("tried", tried)


@pytest.mark.slow
@pytest.mark.fault("{script}: every number nan, -1 or 10^30, and no data", promise="code 2, one line")
@SCRIPTS
def test_numbers_that_are_none(script, world, record_property):
    tried, nowhere = 0, {flag: "/nowhere" for flag in paths_of(script)[:1]}
    for flag, default in defaults_of(script).items():
        words = {int: ("-1", f"1{30 * '0'}"), float: ("nan",)}.get(type(value_of(default)), ())
        for word in words if nowhere else ():
            refused(world, script, world.command(script, **nowhere, **{flag: word}))
            tried += 1
    record_property("tried", tried)


def value_of(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


# ---- as real processes ----------------------------------------------------------------------------------------------

MODES = [
    ("image_train_vae.py", "--use_fp16 yes please", 2),
    ("image_train_vae.py", "--use_fp16 True --amp bf16", 2),
    ("image_train_vae.py", "--image_size 33 --data_dir {data}", 2),
    ("image_train_vae.py", "--lr nan --data_dir {data}", 2),
    ("image_train_vae.py", "--num_heads 3 --data_dir {data}", 2),
    ("image_train_vae.py", "--vae_path stabilityai/sd-vae-ft-mze --data_dir {data}", 2),
    ("image_train_vae.py", "--noise_schedule cosin --data_dir {data}", 2),
    ("image_sample_vae.py", "--model_path {model} --num_steps 5 --timestep_respacing 5", 2),
    ("image_sample_vae.py", "--model_path {model} --sampler euler", 2),
    ("latent_extract.py", "--data_dir {data} --vae_path pixel --out_dir {out}", 2),
    ("vae_train.py", "--dataset mnist --data_root {data}", 2),
    ("evaluator.py", "{samples}", 2),
]


@pytest.mark.slow
@pytest.mark.fault("{script} {flags}", promise="a process of its own ends within 10 s with its code and one line")
@pytest.mark.parametrize("script, flags, code", MODES)
def test_conflicts(script, flags, code, world):
    words = flags.format(data=world.data, model=world.model, samples=world.samples, out=world.root / "out").split()
    done = process(script, *words)
    assert done.returncode == code and len(done.stderr.strip().splitlines()) == 1, (done.returncode, done.stderr)


def process(script, *words, stdout=subprocess.PIPE, limit=LIMIT, **env):
    """A script as a process of its own; on a busy machine its imports alone may take longer than the limit."""
    folder = "evaluations" if (ROOT / "evaluations" / script).exists() else "scripts"
    command = [sys.executable, str(ROOT / folder / script), *map(str, words)]
    env = {name: value for name, value in {**os.environ, "OMP_NUM_THREADS": "1", **env}.items() if value is not None}
    about = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True, "timeout": 6 * limit, "cwd": ROOT}
    return subprocess.run(command, env=env, **about)


@pytest.mark.fault("standard output is a full disk", promise="code 3, one line")
def test_a_full_standard_output():
    with open("/dev/full", "w") as full:
        done = process("simulate_microdoppler.py", "--dry_run", "True", stdout=full)
    assert done.returncode in (3, 120) and "Traceback" not in done.stderr, (done.returncode, done.stderr)


@pytest.mark.slow
@pytest.mark.fault("`... | head`: nobody reads standard output any more", promise="no traceback, code 0")
def test_a_reader_that_left():
    readable, writable = os.pipe()
    os.close(readable)
    with open(writable, "w") as pipe:
        done = process("simulate_microdoppler.py", "--help", stdout=pipe)
    assert done.returncode == 0 and not done.stderr, (done.returncode, done.stderr)


@pytest.mark.slow
@pytest.mark.fault("a terminal of ASCII alone, and a folder with a Chinese name", promise="it works, with escapes")
def test_a_terminal_that_cannot_show_a_name(tmp_path):
    words = ["--out_dir", tmp_path / "数据\udce9", "--dry_run", "True"]
    done = process("simulate_microdoppler.py", *words, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and not done.stderr and r"\u" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.fault("no HOME; HOME that cannot be written; a narrow terminal", promise="it works")
def test_no_home(tmp_path, record_property):
    for env in ({"HOME": None}, {"HOME": "/proc"}, {"COLUMNS": "20", "TERM": "dumb"}):
        done = process("simulate_microdoppler.py", "--dry_run", "True", "--out_dir", tmp_path, **env)
        assert done.returncode == 0 and not done.stderr, (env, done.stderr)
    record_property("tried", 3)


EXTRAS = [
    ("torchdiffeq", "image_sample_vae.py", "--model_path {flow} --sampler dopri5 --num_samples 2"),
    ("transformers", "vae_train.py", "--data_root {data} --use_vf dinov2 --vf_path {data}"),
    ("mpi4py", "image_train_vae.py", "--data_dir {data} --dry_run True"),
    ("matplotlib", "augmentation_study.py", "--dry_run True"),
    ("tensorboard", "image_train_vae.py", "--data_dir {data} --dry_run True"),
]


@pytest.mark.slow
@pytest.mark.fault("without {package}: {script} {words}", promise="it works, or one line says what to install")
@pytest.mark.parametrize("package, script, words", EXTRAS)
def test_an_extra_that_is_not_there(package, script, words, world, tmp_path):
    (tmp_path / f"{package}.py").write_text(f'raise ImportError("No module named {package}", name="{package}")')
    flow = world.trained("flow", "--process", "flow") if "{flow}" in words else ""
    done = process(script, *words.format(data=world.data, flow=flow).split(), PYTHONPATH=str(tmp_path))
    assert done.returncode in (0, 2, 3) and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    assert done.returncode == 0 or "pip install" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.fault("every module imported with warnings as errors", promise="none warns")
def test_imports_do_not_warn(record_property):
    files = [path for folder in ("guided_diffusion_vae", "evaluations") for path in (ROOT / folder).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    program = "import torch, warnings, importlib, sys\nwarnings.simplefilter('error')\n"
    program += "for name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    record_property("tried", len(names))


@pytest.mark.slow
@pytest.mark.fault("the working folder was deleted", promise="one line, or it works")
def test_no_working_folder(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    program = f"import os, sys; os.rmdir({str(gone)!r}); os.execv(sys.argv[1], sys.argv[1:])"
    script = str(ROOT / "scripts" / "simulate_microdoppler.py")
    command = [sys.executable, "-c", program, sys.executable, script, "--dry_run", "True"]
    done = subprocess.run(command, cwd=gone, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 1, done.stderr
    assert not Path(gone).exists()
