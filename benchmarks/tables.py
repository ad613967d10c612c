"""The tables and plots of docs/performance.md from the JSON files that run.py wrote.

    python benchmarks/tables.py

Each table goes between two lines of the document, `<!-- made by benchmarks/tables.py: NAME -->` and `<!-- /NAME -->`,
where NAME is the benchmark's; all else in it stays. The plots need matplotlib and are left out with a line without it.
"""

import argparse
import importlib.util
import json
import re
from pathlib import Path

from guided_diffusion_vae.plotting import new_figure, save_figure

ROOT = Path(__file__).resolve().parent.parent
RATIOS, SCALING = "performance_ratios.png", "performance_scaling.png"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", default=str(ROOT / "benchmarks" / "results"))
    parser.add_argument("--document", default=str(ROOT / "docs" / "performance.md"))
    args = parser.parse_args(argv)
    document, found = Path(args.document), read_results(Path(args.results_dir))
    text = document.read_text()
    for name, results in found.items():
        text = fill(text, name, section(results))
    document.write_text(text)
    for name in missing(text, found):
        print(f"{document} has no place for {name}: add the lines {begin_of(name)} and {end_of(name)}")
    plot(found, document.parent)


def read_results(folder: Path) -> dict[str, dict]:
    """The results of run.py by benchmark; other JSON files are left alone."""
    loaded = (json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json")))
    return {results["benchmark"]: results for results in loaded if "benchmark" in results}


# ---- text


def begin_of(name: str) -> str:
    return f"<!-- made by benchmarks/tables.py: {name} -->"


def end_of(name: str) -> str:
    return f"<!-- /{name} -->"


def missing(text: str, names) -> list[str]:
    """The benchmarks that the document has no place for."""
    return [name for name in names if not _place(name).search(text)]


def fill(text: str, name: str, made: str) -> str:
    """The document with `made` between the two lines of that name."""
    return _place(name).sub(lambda _: f"{begin_of(name)}\n\n{made}\n\n{end_of(name)}", text)


def _place(name):
    return re.compile(f"{re.escape(begin_of(name))}.*?{re.escape(end_of(name))}", re.DOTALL)


def section(results: dict) -> str:
    """One benchmark: its tables, what was left out, and the machine."""
    parts = [pairs_table(results["pairs"]), rows_table(results["rows"]), *results["notes"], machine_line(results)]
    return "\n\n".join(filter(None, parts))


def pairs_table(pairs: list[dict]) -> str:
    """Ours against a rival, one pair a line; empty without pairs."""
    lines = []
    for pair in pairs:
        sides = (f"{side['label']} | {number(side['median'])}" for side in (pair["ours"], pair["rival"]))
        words = [pair["name"], *sides, pair["unit"], ratio(pair["ratio"]), furthest(pair), pair.get("note", "")]
        lines.append(f"| {' | '.join(words)} |")
    head = "| what | ours | | rival | | unit | times as fast | deviation | |\n|---|---|---|---|---|---|---|---|---|"
    return "\n".join([head, *lines]) if lines else ""


def rows_table(rows: list[dict]) -> str:
    """What has no rival, one a line; empty without rows."""
    lines = [
        f"| {row['name']} | {number(row['median'])} [{number(row['least'])}, {number(row['most'])}] | {row['unit']} "
        f"| {row.get('note', '')} |"
        for row in rows
    ]
    return "\n".join(["| what | measured | unit | |\n|---|---|---|---|", *lines]) if lines else ""


def ratio(values: dict) -> str:
    """Median, and least and most in brackets."""
    return f"**{values['median']:.2f}** [{values['least']:.2f}, {values['most']:.2f}]"


def furthest(pair: dict) -> str:
    """The largest of the deviations from the reference; empty where there is none."""
    most = max(pair["deviation"].values()) if pair.get("deviation") else None
    return "" if most is None else f"{most:.0e}" if most else "0"


def number(value: float) -> str:
    """Three digits, never as 1e+04."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine_line(results: dict) -> str:
    """What it was measured on."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    tiny = " (tiny: these numbers mean nothing)" if results["settings"].get("tiny") else ""
    return (
        f"{machine['cpu']}, cores: {machine['cores']}, threads: {machine['threads']}, {machine['memory_gib']} GiB{gpu};"
        f" Python {machine['python']}, {versions}{tiny}."
    )


# ---- plots


def plot(found: dict[str, dict], folder: Path) -> None:
    """Write both plots, of what there is."""
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots (pip install -e '.[plots]')")
        return
    curves = curves_of(row for results in found.values() for row in results["rows"])
    if any(results["pairs"] for results in found.values()):
        plot_ratios(found, folder / RATIOS)
    if curves:
        plot_curves(curves, folder / SCALING)


def curves_of(rows) -> dict[tuple[str, str], list[dict]]:
    """Rows that are points of a curve, by (what changes, which curve)."""
    curves = {}
    for row in rows:
        if "curve" in row:
            curves.setdefault((row["over"], row["curve"]), []).append(row)
    return {key: sorted(points, key=lambda row: row["x"]) for key, points in curves.items()}


def plot_ratios(found: dict[str, dict], path: Path) -> None:
    """How many times as fast, as bars with their range, by benchmark; the line is the rival."""
    bars = []
    for name, results in found.items():
        bars += [(name, None)] * bool(results["pairs"]) + [(name_of(pair), pair["ratio"]) for pair in results["pairs"]]
    figure = new_figure(9, 1 + 0.22 * len(bars), layout="constrained")
    axes = figure.subplots()
    for place, (_, ratio) in enumerate(bars):
        if ratio:
            reach = [[ratio["median"] - ratio["least"]], [ratio["most"] - ratio["median"]]]
            axes.barh(place, ratio["median"], xerr=reach, color="tab:blue", ecolor="0.3")
            axes.text(1.05 * ratio["most"], place, f"{ratio['median']:.3g}", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    for label, (_, ratio) in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_fontweight("normal" if ratio else "bold")
    axes.tick_params(left=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xscale="log", ylim=(len(bars), -1))
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast (median and range)")
    save_figure(figure, path, dpi=110)


def name_of(pair: dict) -> str:
    """What was measured, ours against which rival."""
    ours, rival = pair["ours"]["label"], pair["rival"]["label"]
    return f"{'' if pair['name'] == ours else pair['name'] + ': '}{ours} / {rival}"


def plot_curves(curves: dict[tuple[str, str], list[dict]], path: Path) -> None:
    """One panel for each thing that changes."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    kinds = list(dict.fromkeys((over, points[0]["unit"]) for (over, _), points in curves.items()))
    columns = min(3, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = new_figure(3.6 * columns, 3 * lines, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes in panels[len(kinds) :]:
        axes.axis("off")
    for (over, unit), axes in zip(kinds, panels[: len(kinds)], strict=True):
        for (other, label), points in curves.items():
            if (other, points[0]["unit"]) == (over, unit):
                axes.plot([row["x"] for row in points], [row["median"] for row in points], "o-", label=label)
        axes.set(xlabel=over, ylabel=unit, xscale="log", yscale="log")
        x = sorted({row["x"] for (other, _), points in curves.items() if other == over for row in points})
        axes.set_xticks(x, [f"{value:,g}" for value in x])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.legend(fontsize=7)
    save_figure(figure, path, dpi=110)


if __name__ == "__main__":
    main()
