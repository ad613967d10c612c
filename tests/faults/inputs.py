"""What a user may hand to a script: a world in which every command works, and the ends of commands that do not.

A script is tried in a fork of a process that has imported it: its exit code, its lines and its files are a user's, and
a hundred tries cost no hundred imports.
"""

import contextlib
import faulthandler
import functools
import importlib.util
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from harness import TRAIN, run
from helpers import ROOT, draw_users

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import UserError

LIMIT = 10  # seconds that a bad input may take
SAMPLE = "--num_samples 4 --batch_size 4 --num_steps 2"
SETS = "--real_dir {data} --heldout_dir {data} --samples {samples}"
COMMANDS = {  # that work in a world; each reads what its flags name
    "image_train_vae.py": f"{' '.join(TRAIN)} --max_steps 1 --data_dir {{data}} --val_dir {{data}} --log_dir {{out}}",
    "classifier_train_vae.py": "--image_size 32 --iterations 1 --data_dir {data} --val_data_dir {data} --log_dir {out}",
    "image_sample_vae.py": f"{SAMPLE} --model_path {{model}} --classifier_path {{model}} --log_dir {{out}}",
    "image_nll_vae.py": "--num_steps 2 --model_path {model} --data_dir {data} --log_dir {out}",
    "latent_extract.py": "--image_size 32 --data_dir {data} --val_dir {data} --out_dir {out}",
    "check_vae.py": "--vae_path microdoppler-f4 --data_root {data} --report_dir {out}",
    "vae_train.py": "--image_size 16 --max_steps 1 --data_root {data} --out_dir {out}",
    "vae_test.py": "--ckpt microdoppler-f4 --data_root {data} --report_dir {out}",
    "vae_infer.py": "--ckpt microdoppler-f4 --data_root {data} --out {out}",
    "posthoc_ema.py": "--run_dir {out}",
    "run_pipeline.py": f"{' '.join(TRAIN)} --max_steps 1 --data_dir {{data}} --heldout_dir {{data}} --out_dir {{out}}",
    "simulate_microdoppler.py": "--out_dir {out}",
    "evaluate_samples.py": f"{SETS} --out_dir {{out}}",
    "validate.py": f"{SETS} --out_dir {{out}}",
    "gallery.py": f"{SETS} --out {{out}}/gallery.html",
    "augmentation_study.py": f"{SETS} --out_dir {{out}}",
    "evaluator.py": "{samples} {samples}",
    "make_reference.py": "--data_dir {data} --out {out}/reference.npz",
}
FOLDERS = ("data_dir", "val_dir", "val_data_dir", "data_root", "heldout_dir", "real_dir", "run_dir")
FILES = ("model_path", "classifier_path", "ckpt", "vae_path", "samples")  # or a folder of the right kind


class World:
    """Three users with four images each, a model of one step, samples, and a folder for what is made."""

    def __init__(self, root: Path):
        self.root, self.data, self.out = root, draw_users(root / "data", ["user_00", "user_01", "user_02"], 4), None
        self.samples = root / "samples.npz"
        pixels = np.random.RandomState(0).randint(0, 255, (12, 32, 32, 3)).astype(np.uint8)
        np.savez(self.samples, pixels, np.arange(12) % 3)
        self.model = self.trained("train")
        (root / "out").mkdir()

    def trained(self, folder, *flags):
        """A model of one step."""
        words = f"--max_steps 1 --data_dir {self.data} --log_dir {self.root / folder}".split()
        done = run("image_train_vae.py", *TRAIN, *words, *flags)
        assert done.returncode == 0, done.stderr
        return next((self.root / folder).glob("ema_*.pt"))

    def things(self):
        """What a flag may name in place of what it wants; the last would leave the file `mark` if it were run."""
        place = self.root / "things"
        (place / "empty").mkdir(parents=True, exist_ok=True)
        (place / "text.pt").write_text("a letter")
        (place / "zero.pt").write_bytes(b"")
        found = {"missing": place / "nowhere", "nothing": "", "empty": place / "empty", "text": place / "text.pt"}
        return found | {"zero": place / "zero.pt", "pickle": poisoned(place / "code.pt", self.root / "mark")}

    def command(self, name, **instead):
        """The words of a working command, some of its flags replaced."""
        words = COMMANDS[name].format(data=self.data, model=self.model, samples=self.samples, out=self.root / "out")
        words = words.split()
        for flag, value in instead.items():
            at = words.index(f"--{flag}") if f"--{flag}" in words else len(words)
            words[at : at + 2] = [f"--{flag}", str(value)]
        return words


@functools.cache
def main_of(name):
    """The `main` of a script, imported once."""
    (path,) = (path for folder in ("scripts", "evaluations") if (path := ROOT / folder / name).exists())
    if path.parent.name == "evaluations":
        return importlib.import_module(f"evaluations.{path.stem}").main
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@functools.cache
def defaults_of(name):
    """Flag -> the text of its default, as `--help` tells it."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main_of(name)(["--help"])
    parts = re.split(r"\n  --", text.getvalue())[1:]
    found = {re.match(r"\w+", part)[0]: re.search(r"\(default: (.*)\)", " ".join(part.split())) for part in parts}
    return {flag: default[1] for flag, default in found.items() if default}


def ended(name, words, *, limit=LIMIT):
    """A script's end: (returncode, stdout, stderr); fails if it takes longer than the limit."""
    server = nursery()
    server.stdin.write(json.dumps([name, [str(word) for word in words], limit]) + "\n")
    server.stdin.flush()
    code, out, err = json.loads(server.stdout.readline())
    assert code is not None, f"{name} {words} did not end within {limit} s: {out[-1000:]} {err[-1000:]}"
    return subprocess.CompletedProcess([name, *words], code, out, err)


@functools.cache
def nursery():
    """A process that does nothing but fork: a fork of this one, whose tests start threads, could wait for ever."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:surrogateescape"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__], env=env, cwd=ROOT, **pipes)


def serve():
    """Try each script of a line on standard input, and answer by a line."""
    answers = open(os.dup(1), "w")
    for line in sys.stdin:
        name, words, limit = json.loads(line)
        main = main_of(name)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                become(main, words, out.fileno(), err.fileno(), limit)
            code, texts = wait_for(child, limit), []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read().decode(errors="replace"))
        print(json.dumps([code, *texts]), file=answers, flush=True)


def become(main, words, out, err, limit):
    """Be the script from here on."""
    code = 99
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1), os.dup2(err, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        sys.argv = ["script", *words]
        faulthandler.dump_traceback_later(0.9 * limit, file=sys.stderr)  # where it waits, if it does
        dist_util.run_main(lambda: main(words))
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait_for(child, limit):
    """The child's exit code; None, and its end, if it takes longer."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Payload:
    """A pickle that leaves a mark where it is read as code."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def poisoned(path, mark):
    """A file of pickled code."""
    path.write_bytes(pickle.dumps({"state_dict": Payload(mark), "arr_0": Payload(mark)}))
    return path


def memory():
    """The largest memory of this process since `forget_memory`, in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))


def forget_memory():
    with open("/proc/self/clear_refs", "w") as handle:
        handle.write("5")
    return memory()


def one_line(read, *, within=100):
    """Assert that it ends in one sentence without so many MB of memory; the sentence."""
    before = forget_memory()
    with pytest.raises(UserError) as error:
        read()
    assert memory() - before < within, f"{memory() - before} MB"
    return str(error.value)


if __name__ == "__main__":
    serve()
