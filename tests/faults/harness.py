"""What the faults share: jobs that can be killed whole, folders that must stay as they are, runs that end alike."""

import contextlib
import csv
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import torch as th
from helpers import ROOT

from guided_diffusion_vae import checkpoint, logger, run_state

TINY = "--image_size 32 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 2 --attention_resolutions 8"
TRAIN = f"{TINY} --ema_rate 0.9 --lr 1e-3 --diffusion_steps 100 --log_interval 5 --class_cond True".split()
SMALL = "--batch_size 2 --max_steps 12 --save_interval 3 --keep_last 2 --dropout 0.1 --resume_checkpoint auto"
CLASSIFIER = (
    "--image_size 32 --classifier_width 64 --classifier_depth 1 --classifier_attention_resolutions 4 --lr 1e-3 "
)
CLASSIFIER += "--classifier_channel_mult 1,1 --diffusion_steps 100 --log_interval 5 --batch_size 2 --iterations 12 "
CLASSIFIER += "--save_interval 3 --keep_last 2 --resume_checkpoint auto"
AUTOENCODER = (
    "--half False --ch 8 --ch_mult 1,2 --norm_groups 4 --image_size 16 --batch_size 2 --max_steps 12 --save_interval 3"
)
PIPELINE = f"{TINY} --class_cond True --process flow --num_steps 3 --ema_rate 0.9 --batch_size 2 --log_interval 5"
PIPELINE += " --max_steps 12 --save_interval 3 --num_samples_per_user 2 --sample_batch_size 2"
TOKEN = "GUIDED_DIFFUSION_VAE_FAULT"  # in the environment of a job's processes, whatever became of their parents


class Verb(NamedTuple):
    """What a script does at a tiny size, from what, to where, and the files that it is for."""

    script: str
    flags: list[str]
    reads: str
    writes: str
    makes: tuple[str, ...]

    def words(self, data, out):
        cache = ["--latent_cache", Path(out, "cache")] if self.reads == "--data_dir" and "train" in self.script else []
        return [*self.flags, self.reads, data, self.writes, out, *cache]

    def source(self, data, trained):
        """What it reads: images, or the average of a training."""
        return trained / VERBS["training"].makes[1] if self.reads == "--model_path" else data


VERBS = {
    "training": Verb(
        *("image_train_vae.py", [*TRAIN, *SMALL.split()], "--data_dir", "--log_dir"),
        ("model000012.pt", "ema_0.9_000012.pt", "opt000012.pt"),
    ),
    "latent extraction": Verb(
        *("latent_extract.py", "--image_size 32 --shard_size 2".split(), "--data_dir", "--out_dir"),
        (*(f"latents_rank00_shard{i:03d}.safetensors" for i in range(5)), "latents_stats.pt"),
    ),
    "sampling": Verb(
        *("image_sample_vae.py", "--num_samples 12 --batch_size 2 --num_steps 10 --users all".split()),
        *("--model_path", "--log_dir", ("samples_12x32x32x3.npz", "grid.png", "manifest.csv")),
    ),
    "autoencoder training": Verb(
        "vae_train.py", AUTOENCODER.split(), "--data_root", "--out_dir", ("last.pt", "autoencoder.safetensors")
    ),
    "classifier training": Verb(
        *("classifier_train_vae.py", CLASSIFIER.split(), "--data_dir", "--log_dir"),
        ("model000012.pt", "opt000012.pt"),
    ),
    "the pipeline": Verb(
        *("run_pipeline.py", PIPELINE.split(), "--data_dir", "--out_dir"),
        ("latents/latents_stats.pt", "train/ema_0.9_000012.pt", "samples/samples_4x32x32x3.npz", "samples/grid.png"),
    ),
}


class Job:
    """A script that runs as a user would start it, in the middle of which something happens.

    Args:
        limit: a function that the process calls on itself before it becomes the script, such as a limit of resources.
        launcher: the words before the script's; several `ranks` are started by mpiexec if nothing else is said.
    """

    def __init__(self, name, *flags, ranks=1, launcher=(), limit=None, **env):
        found = [path for folder in ("scripts", "evaluations") if (path := ROOT / folder / name).exists()]
        file = Path(name) if Path(name).is_absolute() else found[0]
        launcher = launcher or (["mpiexec", "-n", ranks] if ranks > 1 else [])
        python = [] if "torch.distributed.run" in launcher else [sys.executable]
        self.command, self.token = [*map(str, (*launcher, *python, file, *flags))], uuid.uuid4().hex
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", TOKEN: self.token, **env}
        about = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": env}
        self.process = subprocess.Popen(self.command, start_new_session=True, preexec_fn=limit, **about)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def processes(self, *words):
        """The numbers of the job's living processes; with words, of those whose command has them all."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended while we looked, or somebody else's
                command = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if f"{TOKEN}={self.token}".encode() in (place / "environ").read_bytes() and set(words) <= set(command):
                    found.append(int(place.name))
        return sorted(found)

    def scripts(self):
        """The processes that run the script: its ranks, torchrun's agent, those that read data for them."""
        return self.processes(sys.executable, next(word for word in self.command if word.endswith(".py")))

    def until(self, true, timeout=600):
        """Wait till something holds of the running job; fails if it ends first."""
        for _ in range(int(timeout / 0.01)):
            if true():
                return self
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.end().stderr}"
            time.sleep(0.01)
        raise AssertionError(f"nothing in {timeout} s")

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def kill(self):
        """kill -9 of every process of the job."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self, timeout=600):
        """The finished process, as `subprocess.run` gives it; no process of the job is left."""
        out, err = self.process.communicate(timeout=timeout)
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"still there: {left}"
        return subprocess.CompletedProcess(self.command, self.process.returncode, out, err)


def run(name, *flags, **options):
    """The finished script, however it ended."""
    with Job(name, *flags, **options) as job:
        return job.end()


def here(name, *flags):
    """Run a script's `main` in this process, for what needs no process of its own."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.main([str(flag) for flag in flags])
    finally:
        logger.reset()


def train(data, out, *flags):
    """The training of `VERBS` in this process."""
    here("image_train_vae", *TRAIN, *SMALL.split(), "--data_dir", data, "--log_dir", out, *flags)


def said(done, code, *words):
    """Assert that a script ended with this code, and with one line on standard error that has these words."""
    assert done.returncode == code, (done.returncode, done.stdout[-1000:], done.stderr[-3000:])
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "stopped"))]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    return lines[0]


def contents(folder):
    """What lies in a folder, and a digest of each file; of a pipe, which would wait for a writer, that it is there."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if not path.is_dir()]
    files = {path: path.read_bytes() if path.is_file() else b"" for path in paths}
    return {str(path.relative_to(folder)): hashlib.sha256(data).hexdigest() for path, data in files.items()}


@contextlib.contextmanager
def undisturbed(*folders):
    """Assert that the block changes no file, adds none and removes none."""
    before = [contents(folder) for folder in folders]
    yield
    after = [contents(folder) for folder in folders]
    assert after == before, {name for a, b in zip(after, before, strict=True) for name, _ in a.items() ^ b.items()}


def assert_tidy(folder):
    """No temporary file, and a table of losses whose steps ascend."""
    left = [path.name for path in Path(folder).rglob("*") if ".tmp-" in path.name]
    assert not left, left
    if (table := Path(folder) / "progress.csv").exists():
        head, *rows = csv.reader(table.read_text().splitlines())
        steps = [int(float(row[head.index("step")])) for row in rows]
        assert all(len(row) == len(head) for row in rows) and steps == sorted(set(steps)), steps


def differences(a, b):
    """The largest difference of each tensor in two files, by name; whatever else is in them, but places, is equal."""
    a, b = (dict(_leaves(checkpoint.load(path))) for path in (a, b))
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    assert all(a[name] == b[name] for name in a if not (th.is_tensor(a[name]) or name.startswith("/arguments")))
    return {name: float((a[name].double() - b[name].double()).abs().max()) for name in a if th.is_tensor(a[name])}


def _leaves(value, name=""):
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if pairs is None:
        yield name, value
    else:
        for key, inner in pairs:
            yield from _leaves(inner, f"{name}/{key}")


def assert_same_end(a, b, *names, atol=0.0):
    """Two runs' files of these names hold the same: bit for bit, or to within `atol`."""
    for one, other in ((Path(a, name), Path(b, name)) for name in names):
        if one.suffix not in (".pt", ".safetensors"):
            assert one.read_bytes() == other.read_bytes(), one.name
            continue
        wrong = {key: far for key, far in differences(one, other).items() if not far <= atol}
        assert not wrong, (one.name, wrong)


def write_checkpoint(folder, number):
    """A small checkpoint whose tensors hold its number."""
    names = "model{:06d}.pt", "ema_0.9_{:06d}.pt", "opt{:06d}.pt"
    files = {name.format(number): {"w": th.full((500,), float(number))} for name in names}
    run_state.write_checkpoint(folder, number, files, {"next_step": number + 1})
