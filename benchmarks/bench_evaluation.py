"""The evaluator's arithmetic: Frechet distance against scipy.linalg.sqrtm, time and memory of precision and recall.

    python benchmarks/bench_evaluation.py [--small]

Features are drawn with a spectrum like that of Inception's (standard deviation 1 / sqrt k), so that the numbers are of
the usual size. The distance is timed from features to number, and from covariances to number.
"""

import argparse
import threading
import time
from pathlib import Path

import numpy as np
import scipy.linalg

from evaluations.manifold import fidelity
from evaluations.official import Stats, frechet_of_features, official_frechet, official_precision_recall


def features(count: int, dimensions: int, *, scale: float, rng) -> np.ndarray:
    spectrum = (scale * np.arange(1, dimensions + 1) ** -0.5).astype(np.float32)
    return rng.standard_normal((count, dimensions), dtype=np.float32) * spectrum + np.float32(0.3)


def usual_stats(features) -> Stats:
    return Stats(np.mean(features, axis=0), np.cov(features, rowvar=False))


def by_sqrtm(a: Stats, b: Stats) -> float:
    """The same distance as it is usually computed."""
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    return float(((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root))


def timed(function, *arguments):
    """(result, seconds)."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def resident() -> float:
    """GiB that the process has in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**30


def peak_extra(function, *arguments):
    """(result, seconds, GiB in memory at most beyond what was there before), sampled every 5 ms."""
    before, most, done = resident(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.005):
            most[0] = max(most[0], resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result, seconds = timed(function, *arguments)
    done.set()
    watcher.join()
    return result, seconds, most[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="on each side")
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--small", action="store_true", help="2500 images, 512 dimensions: half a minute")
    args = parser.parse_args()
    count, dimensions = (2500, 512) if args.small else (args.images, args.dimensions)
    rng = np.random.default_rng(0)
    x, y = (features(count, dimensions, scale=scale, rng=rng) for scale in (4, 3.6))
    print(f"{count} x {dimensions} features a side")
    official_frechet(*(usual_stats(a[:64, :64]) for a in (x, y)))  # warm up
    fast, whole = timed(frechet_of_features, x, y)
    stats, statistics_seconds = timed(lambda: [usual_stats(a) for a in (x, y)])
    _, part = timed(official_frechet, *stats)
    slow, slow_part = timed(by_sqrtm, *stats)
    slow_whole = slow_part + statistics_seconds
    print(f"FD from features:    {whole:.2f} s, sqrtm {slow_whole:.2f} s: {slow_whole / whole:.1f} times faster")
    print(f"FD from covariances: {part:.2f} s, sqrtm {slow_part:.2f} s: {slow_part / part:.1f} times faster")
    print(f"  {fast:.8f} against {slow:.8f}: relative difference {abs(fast / slow - 1):.1e}")
    for name, function in (("official, float16", official_precision_recall), ("centred, float32", fidelity)):
        found, seconds, extra = peak_extra(function, x, y)
        print(f"precision and recall ({name}): {found[0]:.4f} {found[1]:.4f}, {seconds:.1f} s, {extra:.2f} GiB more")


if __name__ == "__main__":
    main()
