"""The command gdvae is the scripts under short names: same flags, same exit codes, from anywhere, also from a wheel."""

import ast
import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, draw_users, script

from guided_diffusion_vae import cli
from guided_diffusion_vae.config import Parser

MODULE = [sys.executable, "-m", "guided_diffusion_vae.cli"]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))


def run(*command, cwd, timeout=300, **env):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **env}
    words = list(map(str, command))
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=env, timeout=timeout)


def gdvae(*words, cwd, **env):
    return run(*MODULE, *words, cwd=cwd, **env)


# ---- commands --------------------------------------------------------------------------------------------------------


def test_every_script_is_a_command():
    named = {name: path.name for name, path in cli.scripts().items()}
    assert sorted(named.values()) == [path.name for path in SCRIPTS]
    assert named["train"] == "image_train_vae.py" and named["posthoc-ema"] == "posthoc_ema.py"
    assert not {name for name in named if not re.fullmatch(r"[a-z][a-z-]*", name)}
    assert set(cli.NAMES) <= {path.stem for path in SCRIPTS}


def test_help_has_the_first_line_of_every_docstring_and_needs_no_torch(tmp_path):
    says = "import sys; from guided_diffusion_vae import cli; sys.argv = ['gdvae', '--help']\n"
    says += "try: cli.main()\nexcept SystemExit as left: print(left.code, 'torch' in sys.modules)"
    lines = run(sys.executable, "-c", says, cwd=tmp_path).stdout.splitlines()
    assert lines[-1] == "0 False"
    for name, path in cli.scripts().items():
        (line,) = (line for line in lines if line.startswith(f"  {name} "))
        assert line.removeprefix(f"  {name}").strip() == ast.get_docstring(ast.parse(path.read_text())).split("\n")[0]
    for name in ("doctor", "completion"):
        assert any(re.match(rf"  {name} +[A-Z]", line) for line in lines)
    for recipe in (ROOT / "configs").glob("*.yaml"):
        assert recipe.name in " ".join(lines)


def test_help_is_there_at_once(tmp_path):
    """Under 0.3 s of processor time, the best of three."""

    def cost():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        gdvae("--help", cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cost() for _ in range(3)) < 0.3


def test_a_command_is_its_script(tmp_path):
    """The same words on both streams and the same exit code, but for the program's name."""
    for words in (["--help"], ["--run_dir", "nowhere"]):
        ours, theirs = gdvae("posthoc-ema", *words, cwd=tmp_path), script("posthoc_ema.py", *words, check=False)
        assert ours.returncode == theirs.returncode == (0 if words == ["--help"] else 2)
        assert ours.stderr == theirs.stderr
        usage = theirs.stdout.replace("usage: posthoc_ema.py", "usage: gdvae posthoc-ema")
        assert ours.stdout.split() == usage.split()


def test_what_is_no_command_is_said_in_a_line(tmp_path):
    wrong = gdvae("trian", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "error: unknown command trian (did you mean train?); gdvae --help lists them\n"
    nothing = gdvae(cwd=tmp_path)
    assert nothing.returncode == 2 and nothing.stdout.startswith("usage: gdvae COMMAND")
    for words in (["completion"], ["completion", "csh"], ["doctor", "--fast"]):
        assert gdvae(*words, cwd=tmp_path).returncode == 2


def test_a_broken_torch_is_a_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libc10.so:\\n cannot open')")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    broken = gdvae("train", "--data_dir", "x", cwd="/", **env)
    assert broken.returncode == 3
    assert broken.stderr == "error: libc10.so: cannot open; `gdvae doctor` says what is broken\n"
    assert "Traceback" in gdvae("train", "--debug", "True", cwd="/", **env).stderr
    assert "--data_dir" in gdvae("train", "--help", cwd="/", **env).stdout  # which needs no torch
    assert "--data_dir" in gdvae("completion", "bash", cwd="/", **env).stdout


def test_two_processes_share_the_work(tmp_path):
    """Under mpiexec the processes know of each other: of one job of two, one speaks."""
    draw_users(tmp_path / "data", ["user_00", "user_01"], 3)
    launcher = ["mpiexec", "-n", 2, *MODULE]
    words = ("--data_dir", "data", "--out_dir", "latents", "--image_size", 32)
    done = run(*launcher, "extract", *words, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("data_dir: data\n") == 1
    assert "only 1 of 2 processes have something to do: --shard_size 3 would give each a shard\n" in done.stdout
    wrong = run(*launcher, "extract", "--nonsense", cwd=tmp_path)
    assert wrong.returncode == 2 and "unknown flag --nonsense" in wrong.stderr


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_a_shipped_recipe_is_found_by_its_name_unless_there_is_one_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(ROOT / "configs" / "demo.yaml")
    for given in ("demo.yaml", "configs/demo.yaml"):
        assert cli.with_recipes(["--lr", "1", "--config", given]) == ["--lr", "1", "--config", shipped]
        assert cli.with_recipes([f"--config={given}"]) == [f"--config={shipped}"]
    for words in (["--config", "mine.yaml"], ["--config", "else/demo.yaml"], ["--out", "demo.yaml"], ["--config"]):
        assert cli.with_recipes(words) == words
    (tmp_path / "demo.yaml").write_text("lr: 1")
    assert cli.with_recipes(["--config", "demo.yaml"]) == ["--config", "demo.yaml"]


def test_a_recipe_reaches_the_script(tmp_path):
    printed = gdvae("vae-train", "--config", "vae_mnist.yaml", "--dry_run", "True", cwd=tmp_path).stdout
    assert "\nmodel: mnist\n" in printed


# ---- completion ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def completions(tmp_path_factory):
    """A folder with each shell's script; the first is made by the command, the others by its function."""
    folder = tmp_path_factory.mktemp("completion")
    made = gdvae("completion", "bash", cwd=folder)
    assert made.returncode == 0 and made.stderr == ""
    (folder / "bash").write_text(made.stdout)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "path", list(sys.path))
        for shell in ("zsh", "fish"):
            with open(folder / shell, "w") as handle, contextlib.redirect_stdout(handle):
                assert cli.completion([shell]) == 0
    return folder


def parser_of(main, monkeypatch):
    """The parser that a script makes."""
    seen = []

    def stop(self, *args):
        seen.append(self)
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(Parser, "parse_known_args", stop)
        with pytest.raises(SystemExit):
            main([])
    return seen[0]


def test_completion_knows_every_flag_of_every_parser(completions, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = dict(re.findall(r'\*:([\w-]+):-\*\) words="(.*)";;', (completions / "bash").read_text()))
    assert list(found) == list(cli.scripts())
    for name, path in cli.scripts().items():
        actions = parser_of(cli.load(path), monkeypatch)._actions
        flags = [flag for action in actions for flag in action.option_strings if flag.startswith("--")]
        assert sorted(found[name].split()) == sorted(flags), name


ASK = {
    "bash": """source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _gdvae; printf '%s\\n' "${COMPREPLY[@]}" """,
    "zsh": """compdef() {}; compadd() { shift; print -l -- ${(M)@:#$words[CURRENT]*} }; _files() {}
              source "$0"; words=("$@"); CURRENT=$#; _gdvae""",
    "fish": """source $argv[1]; complete -C "$argv[2..]" """,
}


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_a_shell_completes(shell, completions):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")

    def offered(*words):
        quiet = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
        done = run(shell, *quiet, "-c", ASK[shell], completions / shell, *words, cwd=completions)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return sorted(done.stdout.split())

    assert offered("gdvae", "tr") == ["train"]
    assert offered("gdvae", "vae-") == ["vae-infer", "vae-test", "vae-train"]
    assert offered("gdvae", "posthoc-ema", "--s") == ["--sigma_rel", "--step"]
    assert offered("gdvae", "posthoc-ema", "--run_dir", "x", "--de") == ["--debug"]
    assert "--sigma_rel" not in offered("gdvae", "train", "--s")
    assert "train" not in offered("gdvae", "posthoc-ema", "tr")
