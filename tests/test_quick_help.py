"""`--help` without PyTorch says what it says with it; nothing else is run without, but what computes nothing."""

import subprocess
import sys

import pytest
from helpers import ROOT

from guided_diffusion_vae import quick_help

COMMANDS = sorted(
    [*ROOT.glob("scripts/*.py"), ROOT / "evaluations/evaluator.py", ROOT / "evaluations/make_reference.py"]
)
WHOLE = """
import contextlib, io, runpy, sys
import torch
for command in sys.argv[1:]:
    sys.argv, words = [command, "--help"], io.StringIO()
    with contextlib.redirect_stdout(words), contextlib.suppress(SystemExit):
        runpy.run_path(command, run_name="__main__")
    print(words.getvalue(), end="\\0")
"""


@pytest.fixture(scope="module")
def whole():
    """What each command says when PyTorch is loaded."""
    done = subprocess.run(
        [sys.executable, "-c", WHOLE, *COMMANDS], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return dict(zip(COMMANDS, done.stdout.split("\0"), strict=False))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_the_same_words(command, whole):
    words = ["-X", "importtime", command, "--help"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == whole[command] and "--" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in loaded and not loaded & {"torch._C", "scipy._lib", "safetensors._safetensors_rust"}


def test_only_for_our_commands_and_only_for_their_help(tmp_path):
    command = str(COMMANDS[0])
    assert quick_help.is_help([command, "--help"]) and quick_help.is_help([command, "--seed", "1", "-h"])
    assert not quick_help.is_help([command]) and not quick_help.is_help([command, "--seed", "1"])
    theirs = tmp_path / "scripts" / "image_train_vae.py"
    theirs.parent.mkdir()
    theirs.touch()
    for argv in ([str(theirs), "--help"], ["-c", "--help"], ["", "--help"], [], ["/nowhere/x.py", "-h"]):
        assert not quick_help.is_help(argv)


def test_nothing_is_replaced_once_pytorch_is_there():
    before = list(sys.meta_path)
    quick_help.install()
    assert sys.meta_path == before
