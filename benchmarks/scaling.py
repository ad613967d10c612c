"""What changes the cost: processes, image size, batch, width of the network, and the number of rows of a data set.

Processes train `image_train_vae.py` with one thread each, on the same images a process, so that the ideal is twice the
images a second. Data sets are shards of made-up latents of 4 x 16 x 16; each is opened in a process of its own, whose
memory is what it tells.
"""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cases
import contenders
import numpy as np
import torch as th
from contenders import Case, OurTraining, our_sampler, scratch, unet
from pictures import draw_images
from timing import Settings, Way, row, single

from guided_diffusion_vae import dist_util, stages
from guided_diffusion_vae.data.latent_shards import write_safetensors
from guided_diffusion_vae.image_datasets import load_data_with_vae

STEPS = 4  # of a walk
LATENT = 4, 16, 16
SHARD = 10_000  # rows, as latent_extract.py makes them
BATCH = 32  # rows at a time out of a data set


def measure(settings: Settings) -> dict:
    """Entries `rows` and `notes` of the results."""
    with scratch() as folder:
        rows, notes = processes(folder, settings)
        contenders.start()
        dist_util.keep_freed_memory()  # as our scripts do
        rows += networks(folder, settings)
        for count in (100, 200) if settings.tiny else (1_000, 10_000, 100_000, 1_000_000):
            found, note = data_set(folder / "rows", count, settings)
            rows, notes = rows + found, notes + note
    return {"rows": rows, "notes": notes}


# ---- processes


def processes(folder: Path, settings: Settings) -> tuple[list[dict], list[str]]:
    """Images a second of training by 1 and 2 processes, by the log of the run itself."""
    data, rows = draw_images(folder / "images", 16 if settings.tiny else 128), []
    steps, every = (2, 1) if settings.tiny else (60, 10)
    small = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "batch_size": 2} if settings.tiny else {}
    flags = {"config": stages.SCRIPTS.parent / "configs" / "demo.yaml", "data_dir": data, "sample_interval": 0}
    flags |= {"max_steps": steps, "log_interval": every, "latent_cache": folder / "cache", **small}
    for count in (1, 2):
        log_dir = folder / f"processes_{count}"
        command = stages.python("image_train_vae.py", flags | {"log_dir": log_dir}, processes=count)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENAI_LOG_FORMAT": "csv"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            note = f"training by {count} processes ended with code {done.returncode}: {done.stderr.strip()[-200:]}"
            print(note, flush=True)
            return rows, [note]
        speeds = [float(line["images_per_second"]) for line in csv.DictReader((log_dir / "progress.csv").open())]
        about = {"over": "processes", "curve": "configs/demo.yaml", "x": count}
        rows.append(row(f"training by {count} processes of 1 thread", "images/s", speeds[1:], **about))
    gained = rows[1]["median"] / rows[0]["median"]
    rows[1]["note"] = f"{gained:.2f} times one process"
    return rows, []


# ---- networks


def networks(folder: Path, settings: Settings) -> list[dict]:
    """Training and sampling over image size, batch and width; all else as the 64-channel U-Net on 64 pixels."""
    least = {"channels": 32, "mult": "1,2", "blocks": 1}
    if settings.tiny:
        over = {"image size, px": {64: Case("", 1, unet(**least))}, "batch": {2: Case("", 2, unet(**least))}}
    else:
        sizes = {size: Case("", 8, unet(image_size=size, attention=size // 8)) for size in (64, 128)}
        batches = {batch: Case("", batch, unet()) for batch in (1, 4, 16, 64)}
        widths = {channels: Case("", 8, unet(channels=channels)) for channels in (32, 64, 128)}
        over = {"image size, px": sizes, "batch": batches, "channels": widths}
    points = [(kind, x, case) for kind, of_kind in over.items() for x, case in of_kind.items()]
    return [row for point in points for row in cost(*point, folder, settings)]


def cost(kind: str, x: int, case: Case, folder: Path, settings: Settings) -> list[dict]:
    """Both verbs of one network."""
    ways = {
        "training": Way("", OurTraining(case, channels_last=True).step, case.batch),
        "sampling, images x steps": Way("", our_sampler(case, STEPS, folder / "model"), case.batch * STEPS),
    }
    about = {"over": kind, "x": x, **case.about()}
    return [single(f"{name}, {kind} {x}", way, "images/s", settings, curve=name, **about) for name, way in ways.items()]


# ---- data sets


def data_set(folder: Path, count: int, settings: Settings) -> tuple[list[dict], list[str]]:
    """What it takes to open and read a data set of so many rows."""
    folder.mkdir(exist_ok=True)
    needed, free = 4 * int(np.prod(LATENT)) * count, disk_free(folder)
    if needed * 1.1 > free:
        note = f"{count:,} rows take {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free: left out"
        print(note, flush=True)
        return [], [note]
    write_rows(folder, count)
    found = [opened(folder) for _ in range(1 if settings.tiny else 3)]
    for path in folder.iterdir():
        path.unlink()
    units = {"open": "s", "first batch": "s", "batches": "batches/s"}
    units |= {"memory": "MiB", "memory, without mapped files": "MiB"}
    about = {"over": "rows", "x": count}
    return [
        row(f"{count:,} rows: {name}", unit, [values[name] for values in found], curve=name, **about)
        for name, unit in units.items()
    ], []


def disk_free(folder) -> int:
    """Bytes."""
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize


def write_rows(folder: Path, count: int) -> None:
    """Shards of normal numbers, with labels, as LightningDiT would write them: without a word on their origin."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((min(count, SHARD), *LATENT), dtype=np.float32)
    for number, first in enumerate(range(0, count, SHARD)):
        labels = rng.integers(contenders.USERS, size=min(SHARD, count - first))
        tensors = {"latents": [block[: len(labels)]], "labels": [labels]}
        write_safetensors(folder / f"latents_rank00_shard{number:03d}.safetensors", tensors, {"format": "pt"})


def opened(folder: Path) -> dict[str, float]:
    """`read` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, str(folder)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def read(folder: str, steps: int = 200) -> dict[str, float]:
    """Seconds to open a data set and to its first batch, batches a second, and MiB that it all takes."""
    th.set_num_threads(1)
    vae, before = cases.unets(True)[0].vae, memory()
    begin = time.perf_counter()
    about = {"batch_size": BATCH, "image_size": 64, "class_cond": True, "say": lambda line: None}
    stream = load_data_with_vae(data_dir=folder, vae=vae, **about)
    was_opened = time.perf_counter()
    next(stream)
    first = time.perf_counter()
    for _ in range(steps):
        next(stream)
    rate, after = steps / (time.perf_counter() - first), memory()
    own, whole = ((after[name] - before[name]) / 1024 for name in ("RssAnon", "VmRSS"))
    taken = {"memory": whole, "memory, without mapped files": own}
    return {"open": was_opened - begin, "first batch": first - was_opened, "batches": rate, **taken}


def memory() -> dict[str, int]:
    """KiB that this process has in memory (Linux)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words and words[0] in ("VmRSS:", "RssAnon:")}


if __name__ == "__main__":
    print(json.dumps(read(sys.argv[1])))
