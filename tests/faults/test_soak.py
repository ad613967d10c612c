"""For long: memory and open files stay what they were. FAULT_SOAK_MINUTES says how long (2)."""

import gc
import os
import time
from pathlib import Path

import pytest
from harness import SMALL, TRAIN, assert_tidy, here
from helpers import draw_users

MINUTES = float(os.environ.get("FAULT_SOAK_MINUTES", 2))
WARM_UP, GROWTH = 4, 8_000_000  # rounds; bytes that all later ones together may add


def held():
    """Bytes of memory that are this process's own, and its open files."""
    gc.collect()
    words = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    own = sum(int(words[name].split()[0]) * 1024 for name in ("Private_Clean", "Private_Dirty", "SwapPss"))
    return own, len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.fault(
    "rounds of training, validation, grids and sampling in one process for minutes",
    promise="no file stays open, memory grows by less than 8 MB after the first rounds",
)
def test_soak(tmp_path, record_property):
    data = draw_users(tmp_path / "data", ["user_00", "user_01"], 5)
    out, flags = (
        tmp_path / "run",
        [*TRAIN, *SMALL.split(), "--data_dir", data, "--val_dir", data, "--sample_interval", 6],
    )
    begin, rounds, seen = time.monotonic(), 0, []
    while rounds < 2 * WARM_UP or time.monotonic() - begin < 60 * MINUTES:
        rounds += 1
        here("image_train_vae", *flags, "--log_dir", out, "--max_steps", 12 * rounds)
        model = out / f"ema_0.9_{12 * rounds:06d}.pt"
        about = ["--model_path", model, "--log_dir", tmp_path / "samples", "--num_samples", 4, "--num_steps", 5]
        here("image_sample_vae", *about)
        seen.append(held())
    (memory, files), (memory_then, files_then) = seen[-1], seen[WARM_UP - 1]
    some = seen[:: max(1, len(seen) // 25)]
    assert files <= files_then, some
    assert memory - memory_then < GROWTH, f"{len(seen)} rounds, MB after some: {[round(m / 1e6, 1) for m, _ in some]}"
    assert_tidy(out)
    record_property("tried", rounds)
