"""Run the benchmarks, or those named, and write one JSON a benchmark; `tables.py` makes docs/performance.md of them.

    python benchmarks/run.py                              all of them, in half an hour or more: `make bench`
    python benchmarks/run.py training sampling startup    these
    python benchmarks/run.py job --model_path runs/one/ema_0.99_000900.pt

Two ways to do a thing always run in turn within one run, and the ratio is taken within each round (`timing.py`). A
rival that is not installed (`pip install --no-deps guided-diffusion-sdk`, the official code as packaged in 2022; it is
only run here, never read) is left out with a line. Nothing else should run on the machine meanwhile.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import machine
from timing import Settings

FAMILIES = (
    *("training", "sampling", "job", "cached_latents", "data_loading", "evaluation", "startup", "scaling", "ceiling"),
)
RESULTS = Path(__file__).resolve().parent / "results"


def main(argv=None):
    args = arguments(argv)
    names = args.benchmarks or FAMILIES
    if len(names) == 1:
        run_one(names[0], args)
        return
    begin, failed = time.monotonic(), [name for name in names if in_own_process(name, args)]
    print(f"{len(names)} benchmarks in {time.monotonic() - begin:.0f} s; results in {args.out_dir}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = f"which; none: all of {', '.join(FAMILIES)}"
    parser.add_argument("benchmarks", nargs="*", choices=[*FAMILIES, []], metavar="benchmark", help=known)
    parser.add_argument("--out_dir", default=str(RESULTS), help="folder of the JSON files")
    parser.add_argument("--tiny", action="store_true", help="only see that all of it runs; numbers mean nothing")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="of each pair, at most")
    parser.add_argument("--budget_s", type=float, default=Settings.budget_s, help="seconds of each pair, about")
    parser.add_argument("--model_path", default="", help="a checkpoint for whole sampling jobs; none: no `job`")
    parser.add_argument("--num_samples", type=int, default=Settings.num_samples, help="images of such a job")
    parser.add_argument("--launcher", default="", help="of such a job, such as 'mpiexec -n 2'")
    return parser.parse_args(argv)


def run_one(name: str, args: argparse.Namespace) -> None:
    """Run a benchmark in this process and write its results."""
    given = {field: value for field, value in vars(args).items() if field not in ("benchmarks", "out_dir")}
    settings = Settings(**given)
    if settings.tiny:
        settings = Settings(**given | {"rounds": 1, "budget_s": 0.0})
    print(f"# {name}", flush=True)
    begin = time.monotonic()
    found = importlib.import_module(name).measure(settings)
    about = {"benchmark": name, "machine": machine.describe(), "settings": vars(settings)}
    results = {**about, "seconds": round(time.monotonic() - begin, 1), "pairs": [], "rows": [], "notes": [], **found}
    if not results["pairs"] and not results["rows"]:
        return  # the notes have been printed; results that lie there are not replaced by none
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    (Path(args.out_dir) / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def in_own_process(name: str, args: argparse.Namespace) -> int:
    """The same flags for one benchmark, which finds fresh memory and threads; returns its exit code."""
    given = {flag: value for flag, value in vars(args).items() if flag not in ("benchmarks", "tiny")}
    flags = ["--tiny"] * args.tiny + [f"--{flag}={value}" for flag, value in given.items()]
    return subprocess.run([sys.executable, __file__, name, *flags]).returncode


if __name__ == "__main__":
    main()
