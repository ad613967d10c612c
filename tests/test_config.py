"""The configuration mechanism: precedence, typed reading, and errors that name the flag and the remedy."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import yaml
from helpers import ROOT

from guided_diffusion_vae import config


@dataclass(frozen=True, kw_only=True)
class Toy:
    lr: float = 1e-4  # learning rate, 100% yours
    steps: int = 5  # how many
    # stands above its field
    flip: bool = False
    name: str = ""

    def __post_init__(self):
        if self.steps < 1:
            raise config.UserError(f"--steps is {self.steps}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Other:
    width: int = 32


def parse(*flags, base=None):
    return config.parse_run(config.create_argparser(Toy, Other), list(flags), base=base)


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_precedence_is_default_base_recipe_flag(tmp_path):
    path = recipe(tmp_path, "steps: 30\nwidth: 3\n")
    run = parse("--config", path, "--width", "4", base={"lr": 0.2, "steps": 20, "width": 2, "unknown_to_us": 1})
    assert (run.lr, run.steps, run.width, run.flip) == (0.2, 30, 4, False)
    assert run.given == {"steps", "width"}
    assert run.section(Toy) == Toy(lr=0.2, steps=30)


@pytest.mark.parametrize("text, value", [("lr: 1e-4", 1e-4), ("lr: 1.0e-4", 1e-4), ("lr: 1", 1.0)])
def test_yaml_numbers_are_read_as_flags_are(tmp_path, text, value):
    """PyYAML alone reads 1e-4 as the string '1e-4'."""
    assert parse("--config", recipe(tmp_path, text)).lr == value


@pytest.mark.parametrize("word, value", [("yes", True), ("True", True), ("1", True), ("no", False), ("f", False)])
def test_booleans_take_a_value_as_upstream(tmp_path, word, value):
    assert parse("--flip", word).flip is value
    assert parse("--config", recipe(tmp_path, f"flip: {word}")).flip is value


@pytest.mark.parametrize(
    "text, words",
    [
        ("stepps: 3", ["stepps", "did you mean steps"]),
        ("steps: three", ["steps", "three", "int"]),
        ("flip: maybe", ["flip", "maybe"]),
        ("- a\n- b", ["list"]),
        ("steps: [1", ["not valid YAML"]),
        ("steps: {a: 1}", ["flat"]),
        ("a: &x [1]\nb: *x", ["aliases"]),
        ("!!python/object/apply:os.system ['true']", ["not valid YAML"]),
        ("steps: 0", ["--steps is 0"]),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path, text, words):
    with pytest.raises(config.UserError) as error:
        parse("--config", recipe(tmp_path, text))
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_flag_suggests_the_nearest():
    with pytest.raises(config.UserError, match=r"--stepz .did you mean --steps"):
        parse("--stepz", "3")


def test_help_shows_the_comment_and_the_default():
    text = config.create_argparser(Toy).format_help()
    assert "learning rate, 100% yours (default: 0.0001)" in " ".join(text.split())
    assert "stands above its field" in text


def test_the_printed_run_is_a_recipe(tmp_path):
    run = parse("--steps", "7", "--flip", "True", "--name", "é: #1", "--dry_run", "True")
    again = parse("--config", recipe(tmp_path, str(run)))
    assert again.as_dict() == run.as_dict() == yaml.safe_load(str(run))


def test_the_brief_form_is_the_same_run(tmp_path):
    """Only what was given or is not the default, under its section's name; as a recipe it gives every setting again."""
    run = parse("--flip", "False", "--name", "x", base={"steps": 9, "lr": Toy.lr})
    assert str(run).splitlines() == [
        *("# Toy", "steps: 9", "flip: false", "name: x"),
        "# the other 2 settings have their defaults: --dry_run True prints all",
    ]
    assert parse("--config", recipe(tmp_path, str(run))).as_dict() == run.as_dict()
    assert [line for line in str(parse("--width", "3")).splitlines()[:-1]] == ["# Other", "width: 3"]


def test_help_opens_with_its_usage_in_one_line():
    parser = config.create_argparser(Toy, description="What it does.")
    parser.prog = "toy.py"
    assert parser.format_help().startswith("usage: toy.py [--FLAG VALUE ...]\n\nWhat it does.\n")
    parser.add_argument("ref", metavar="REF")
    assert parser.format_help().startswith("usage: toy.py REF [--FLAG VALUE ...]\n\n")


def test_upstream_helpers():
    """`add_dict_to_argparser` types flags by their default: None is a string, bool is str2bool."""
    parser = config.Parser()
    config.add_dict_to_argparser(parser, {"a": 1, "b": True, "c": None, "d": 0.5})
    args = parser.parse_args(["--a", "2", "--b", "no", "--c", "3"])
    assert config.args_to_dict(args, "abcd") == {"a": 2, "b": False, "c": "3", "d": 0.5}


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("image_train_vae.py", ["--lrr", "1"], ["--lrr", "did you mean --lr"]),
        ("image_train_vae.py", ["--batch_size", "many"], ["batch_size", "many"]),
        ("image_train_vae.py", ["--use_fp16"], ["use_fp16"]),
        ("image_sample_vae.py", ["--model_path", "nowhere.pt"], ["--model_path", "nowhere.pt", "does not exist"]),
    ],
)
def test_scripts_leave_with_2_and_one_line(script, flags, words):
    done = subprocess.run([sys.executable, f"scripts/{script}", *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(
    "script, flag",
    [
        *[(name, "data_dir") for name in ("image_train_vae.py", "classifier_train_vae.py", "latent_extract.py")],
        *[(name, "data_root") for name in ("vae_train.py", "check_vae.py")],
    ],
)
def test_a_dry_run_misses_its_data_as_the_run_would(script, flag, tmp_path):
    words = ["--dry_run", "True", f"--{flag}", str(tmp_path / "nowhere")]
    done = subprocess.run([sys.executable, f"scripts/{script}", *words], capture_output=True, text=True)
    expected = f"error: --{flag} {tmp_path}/nowhere does not exist; give a folder\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_dry_run_prints_the_resolved_run_and_stops(tmp_path):
    flags = ["--dry_run", "True", "--lr", "0.5"]
    done = subprocess.run([sys.executable, "scripts/image_train_vae.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout)
    assert printed["lr"] == 0.5 and printed["diffusion_steps"] == 1000


@dataclass(frozen=True, kw_only=True)
class Child(Toy):
    deeper: int = 1  # the child's own


def test_help_of_inherited_fields():
    assert config.field_help(Child) == config.field_help(Toy) | {"deeper": "the child's own"}
    assert config.field_help(Toy)["flip"] == "stands above its field"


@pytest.mark.parametrize("name", ["demo.yaml", "configs/dmeo.yaml"])
def test_the_recipe_that_was_meant_is_named(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(config.UserError, match=rf"--config {name} does not exist \(did you mean configs/demo.yaml\?\)"):
        config.read_yaml(name)
