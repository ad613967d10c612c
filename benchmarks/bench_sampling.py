"""Ways to sample one model, side by side in one run: images a second, identity, distance and variety.

    python benchmarks/bench_sampling.py --model_path runs/one/ema_0.99_000900.pt --real_dir DATA/train \\
        --heldout_dir DATA/test "--sampler p_sample --num_steps 250" "--sampler dpmpp_2m --num_steps 20"
    python benchmarks/bench_sampling.py ... --plot docs/guidance.png "--cfg_scale 1" "--cfg_scale 2" "--cfg_scale 4"

Each way is a string of flags of `image_sample_vae.py`, or "official" and such flags for the official code
(`official_sampler.py`). Every round runs all of them, from the front or from the
back in turn, with a seed of its own; speed is that of the sampling loop, with decoding. One judge, which learned from
most of the real training images, measures all: `FD_user` is the Frechet distance of all samples of a round to held-out
images. Its floor is the distance of two halves of the held-out images, and that of the training images set aside.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch as th

from evaluations.image_sets import read_real, read_samples
from evaluations.manifold import fidelity
from evaluations.measure import set_aside
from evaluations.statistics import frechet_distance
from evaluations.user_classifier import train_user_classifier
from guided_diffusion_vae.plotting import new_figure, save_figure

HERE = Path(__file__).resolve().parent
SCRIPT, OFFICIAL = HERE.parent / "scripts" / "image_sample_vae.py", HERE / "official_sampler.py"
COLUMNS = {"images_per_second": "images/s", "user_accuracy": "named right", "fd_user": "FD_user"}
COLUMNS |= {"precision": "precision", "recall": "recall"}


def sample(args, way: str, seed: int, folder: Path) -> tuple[Path, float]:
    """Run the sampler; returns its .npz and its images a second."""
    own = ["--model_path", args.model_path, "--log_dir", str(folder), "--seed", str(seed), "--save_png", "False"]
    own += ["--num_samples", str(args.num_samples), "--users", "all", "--batch_size", str(args.batch_size)]
    flags = shlex.split(way)
    script = OFFICIAL if flags[:1] == ["official"] else SCRIPT
    command = [*shlex.split(args.launcher), sys.executable, str(script), *own, *flags[script is OFFICIAL :]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OPENAI_LOG_FORMAT": "stdout"})
    if done.returncode:
        raise SystemExit(f"{way}: ended with code {done.returncode}")
    return next(folder.glob("samples_*.npz")), float(re.findall(r"samples of \d+, (\S+) a second", done.stdout)[-1])


def scores(judge, samples, reference) -> dict[str, float]:
    found = judge.judge(samples.pixels)
    shape = fidelity(reference, found.features)
    return {
        "user_accuracy": float((found.users == samples.labels).mean()),
        "fd_user": frechet_distance(found.features, reference),
        "precision": shape.precision,
        "recall": shape.recall,
    }


def plot(results: dict, path: str, title: str) -> None:
    """Identity, distance and variety over the number that differs between the ways."""
    ways = list(results["ways"])
    x = [float(re.findall(r"-?\d+\.?\d*", way)[-1]) for way in ways]
    figure = new_figure(9, 3.2, layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("user_accuracy", "fd_user", "recall"), strict=True):
        values = [results["ways"][way][name] for way in ways]
        axes.plot(x, [value["median"] for value in values], "o-")
        axes.fill_between(x, [value["least"] for value in values], [value["most"] for value in values], alpha=0.2)
        for label, style in (("other sessions", ":"), ("same sessions", "--")):
            if name in results["real"].get(label, {}):
                axes.axhline(results["real"][label][name], linestyle=style, color="grey", label=f"real, {label}")
        axes.set(xlabel=re.sub(r"[\d.\s-]+$", "", ways[0].split("--")[-1]), title=COLUMNS[name])
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="+", help="flags of image_sample_vae.py, as one string each")
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--real_dir", required=True)
    parser.add_argument("--heldout_dir", required=True)
    parser.add_argument("--num_samples", type=int, default=496)
    parser.add_argument("--batch_size", type=int, default=62)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--launcher", default="", help="such as 'mpiexec -n 2'")
    parser.add_argument("--out", default="", help="a .json for the results")
    parser.add_argument("--plot", default="", help="a .png (needs matplotlib)")
    args = parser.parse_args()

    measured = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as root:
        files = []
        for number in range(args.rounds):
            for place, way in enumerate(args.ways if number % 2 == 0 else args.ways[::-1]):
                files.append((way, *sample(args, way, number, Path(root, f"{number}_{place}"))))
                print(f"round {number + 1}, {way}: {files[-1][2]:.3g} images/s", flush=True)
        some = np.load(files[0][1])["arr_0"]
        train, heldout = read_real(args.real_dir, args.heldout_dir, some.shape[1:3])
        aside, learned = set_aside(train.labels, np.random.default_rng(0))
        judge = train_user_classifier(train.pixels[learned], train.labels[learned], len(train.class_names))
        reference = judge.judge(heldout.pixels)
        for way, path, speed in files:
            samples = read_samples(path)
            measured[way].append({"images_per_second": speed, **scores(judge, samples, reference.features)})

    order = np.random.default_rng(0).permutation(len(heldout.pixels))
    halves = reference.features[order[::2]], reference.features[order[1::2]]
    results = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": th.__version__,
        },
        "settings": {
            name: value for name, value in vars(args).items() if name in ("num_samples", "batch_size", "rounds")
        },
        "heldout_images": len(heldout.pixels),
        "real": {
            "other sessions": {"user_accuracy": float((reference.users == heldout.labels).mean())},
            "same sessions": scores(judge, train.take(aside), reference.features),
            "other sessions, two halves": {"fd_user": frechet_distance(*halves)},
        },
        "ways": {
            way: {
                name: {"median": statistics.median(v), "least": min(v), "most": max(v)}
                for name in COLUMNS
                for v in [[row[name] for row in rows]]
            }
            for way, rows in measured.items()
        },
    }
    width = max(map(len, args.ways))
    print(f"{'':{width}}  " + "  ".join(f"{title:>11}" for title in COLUMNS.values()))
    for way, row in results["ways"].items():
        print(f"{way:{width}}  " + "  ".join(f"{row[name]['median']:11.4g}" for name in COLUMNS))
    for name, row in results["real"].items():
        print(f"real, {name}: " + ", ".join(f"{COLUMNS[key]} {value:.4g}" for key, value in row.items()))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        rounds = f", median and range of {args.rounds} rounds" if args.rounds > 1 else ""
        plot(results, args.plot, f"{args.num_samples} images a point{rounds}")


if __name__ == "__main__":
    main()
