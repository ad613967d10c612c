"""For long: memory and open files stay what they were. FAULT_SOAK_MINUTES says how long (2)."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import SMALL, TRAIN, assert_tidy, here
from helpers import draw_users

MINUTES = float(os.environ.get("FAULT_SOAK_MINUTES", 2))
WARM_UP, GROWTH = 4, 8_000_000  # rounds; bytes that all later ones together may add


def held():
    """Bytes of memory that this process was given (pages of files are not counted: they are its own as long as no other
    process reads them), and its open files."""
    gc.collect()
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = sum(int(words[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))
    return own, len(os.listdir("/proc/self/fd"))


def soak(folder: Path) -> None:
    """Rounds until the minutes are over, each a line of `held.txt`."""
    data = draw_users(folder / "data", ["user_00", "user_01"], 5)
    flags = [*TRAIN, *SMALL.split(), "--data_dir", data, "--val_dir", data, "--sample_interval", 6]
    begin, rounds = time.monotonic(), 0
    while rounds < 4 * WARM_UP or time.monotonic() - begin < 60 * MINUTES:
        rounds += 1
        here("image_train_vae", *flags, "--log_dir", folder / "run", "--max_steps", 12 * rounds)
        model = folder / "run" / f"ema_0.9_{12 * rounds:06d}.pt"
        about = ["--model_path", model, "--log_dir", folder / "samples", "--num_samples", 4, "--num_steps", 5]
        here("image_sample_vae", *about)
        with open(folder / "held.txt", "a") as log:
            print(*held(), file=log)


@pytest.mark.slow
@pytest.mark.fault(
    "rounds of training, validation, grids and sampling in one process for minutes",
    promise="no file stays open, memory grows by less than 8 MB after the first rounds",
)
def test_soak(tmp_path, record_property):
    """In a process of its own: pytest keeps what is printed and warned. An allocator gives back what is free when it
    likes, so the least of the last quarter counts against the least of the first."""
    where = {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, tmp_path], check=True, stdout=subprocess.DEVNULL, env=os.environ | where)
    seen = [tuple(map(int, line.split())) for line in (tmp_path / "held.txt").read_text().splitlines()][WARM_UP:]
    first, last = seen[: len(seen) // 4], seen[-(len(seen) // 4) :]
    some = [round(memory / 1e6, 1) for memory, _ in seen[:: max(1, len(seen) // 25)]]
    assert min(last)[0] - min(first)[0] < GROWTH, f"{len(seen)} rounds, MB after some: {some}"
    assert last[-1][1] <= first[0][1], [files for _, files in seen]
    assert_tidy(tmp_path / "run")
    record_property("tried", len(seen) + WARM_UP)


if __name__ == "__main__":
    soak(Path(sys.argv[1]))
