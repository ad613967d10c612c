"""The console command `gdvae`: every script under a short name, from any folder.

    gdvae train --config demo.yaml --data_dir DATA/train

is `python scripts/image_train_vae.py` with the same flags and exit codes. A new script is a new command by being there;
only those whose name is long are named here. PyTorch is not imported before a script is.
"""

import ast
import contextlib
import importlib
import io
import re
import signal
import sys
import textwrap
from pathlib import Path

from .config import EXIT_ENVIRONMENT, EXIT_USER, debug_wanted, did_you_mean
from .quick_help import install as without_torch

HERE = Path(__file__).resolve().parent
NAMES = {  # in the order of use; all other scripts follow under their own names
    "simulate_microdoppler": "simulate",
    "latent_extract": "extract",
    "image_train_vae": "train",
    "image_sample_vae": "sample",
    "evaluate_samples": "evaluate",
    "validate": "validate",
    "run_pipeline": "pipeline",
    "classifier_train_vae": "classifier-train",
    "image_nll_vae": "nll",
}


def shipped(folder: str) -> Path:
    """A folder of the repository: within the package in a wheel, beside it in a checkout."""
    inside = HERE / folder
    return inside if inside.is_dir() else HERE.parent / folder


def scripts() -> dict[str, Path]:
    """Name of the command -> its script."""
    found = {NAMES.get(path.stem, path.stem.replace("_", "-")): path for path in shipped("scripts").glob("*.py")}
    return {name: found[name] for name in dict.fromkeys([*NAMES.values(), *sorted(found)]) if name in found}


def help_text() -> str:
    """What `gdvae --help` prints: a line for each command, the first of its docstring."""
    files = scripts() | {"doctor": HERE / "doctor.py"}
    about = {name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) for name, path in files.items()}
    about["completion"] = completion.__doc__
    recipes = ", ".join(sorted(path.name for path in shipped("configs").glob("*.yaml")))
    notes = (
        "gdvae COMMAND --help explains a command's flags. Where it says `python scripts/image_train_vae.py`, type"
        " `gdvae train`. On several GPUs or cores: mpiexec -n 2 gdvae COMMAND ...",
        f"--config takes a file, or a shipped recipe by its name: {recipes}.",
    )
    lines = (f"  {name:18} {(text or '').partition(chr(10))[0]}" for name, text in about.items())
    return "\n".join(
        ["usage: gdvae COMMAND [--flag value ...]", "", *lines, "", *(textwrap.fill(n, 100) for n in notes)]
    )


def with_recipes(words: list[str]) -> list[str]:
    """The words of a command, `--config NAME` as the shipped recipe of that name if there is no such file here."""

    def found(name):
        path = shipped("configs") / name.removeprefix("configs/")
        return str(path) if path.is_file() and not Path(name).exists() else name

    joined = (f"--config={found(word[9:])}" if word.startswith("--config=") else word for word in words)
    return [found(word) if before == "--config" else word for before, word in zip(["", *words], joined, strict=False)]


def load(script: Path):
    """A script's `main`, as `python SCRIPT` would find it."""
    sys.path.insert(0, str(script.parent))
    return importlib.import_module(script.stem).main


def main() -> None:
    """Run the command that the first word names; the others are its flags.

    Exit codes: 2 for a name that is no command, 3 if its packages cannot be imported; else the script's own.
    """
    name, *words = sys.argv[1:] or [""]
    script = scripts().get(name)
    if script is None and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head`
    if name in ("", "-h", "--help"):
        print(help_text())
        sys.exit(0 if name else EXIT_USER)
    if name == "doctor":
        from . import doctor

        sys.exit(doctor.main(words))
    if name == "completion":
        sys.exit(completion(words))
    if script is None:
        near = did_you_mean(name, [*scripts(), "doctor", "completion"])
        print(f"error: unknown command {name}{near}; gdvae --help lists them", file=sys.stderr)
        sys.exit(EXIT_USER)
    sys.argv = [f"gdvae {name}", *with_recipes(words)]
    if not {"-h", "--help"}.isdisjoint(words):
        without_torch()
    try:
        run = load(script)
        from .dist_util import run_main
    except (ImportError, OSError, RuntimeError) as error:  # as a broken torch or torchvision raise
        if debug_wanted():
            raise
        print(f"error: {' '.join(str(error).split())}; `gdvae doctor` says what is broken", file=sys.stderr)
        sys.exit(EXIT_ENVIRONMENT)
    run_main(run)


# ---- completion: words that never change are found when the script is made, so that none is waited for at the TAB ----

SHELLS = {  # before the cases, a case of a pattern and its words, after them
    "bash": (
        '_gdvae() {\n    local words=""\n    case "$COMP_CWORD:${COMP_WORDS[1]}:${COMP_WORDS[COMP_CWORD]}" in',
        '        1:*) words="{}";;',
        '        *:{}:-*) words="{}";;',
        '    esac\n    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))\n}'
        "\ncomplete -o default -F _gdvae gdvae",
    ),
    "zsh": (
        '#compdef gdvae\n_gdvae() {\n    case "$((CURRENT - 1)):$words[2]:$words[CURRENT]" in',
        "        1:*) compadd -- {};;",
        "        *:{}:-*) compadd -- {};;",
        "        *) _files;;\n    esac\n}\ncompdef _gdvae gdvae",
    ),
    "fish": (
        "",
        'complete -c gdvae -n __fish_use_subcommand -f -a "{}"',
        'for flag in (string split " " -- "{1}")\n'
        '    complete -c gdvae -n "__fish_seen_subcommand_from {0}" -l (string sub -s 3 -- $flag) -r\nend',
        "",
    ),
}


def completion(words: list[str]) -> int:
    """Print a completion script, to be kept: gdvae completion bash|zsh|fish > FILE, then `source FILE`."""
    if words in (["-h"], ["--help"]):
        print(completion.__doc__)
        return 0
    if len(words) != 1 or words[0] not in SHELLS:
        print(f"error: completion of which shell? gdvae completion {'|'.join(SHELLS)}", file=sys.stderr)
        return EXIT_USER
    without_torch()
    head, first, other, tail = SHELLS[words[0]]
    flags = {name: " ".join(flags_of(path)) for name, path in scripts().items()}
    names = " ".join([*flags, "doctor", "completion"])
    cases = [first.format(names), *(other.format(*case) for case in flags.items())]
    print("\n".join([head, *cases, tail]).strip())
    return 0


def flags_of(script: Path) -> list[str]:
    """The flags that a script's `--help` shows."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        load(script)(["--help"])
    columns = re.findall(r"^  (-.*?)(?:  |$)", shown.getvalue(), re.MULTILINE)
    return [flag for column in columns for flag in re.findall(r"--[\w-]+", column)]


if __name__ == "__main__":
    main()
