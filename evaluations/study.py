"""What an augmentation study found: tables, a plot, and a verdict for each number of real images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from guided_diffusion_vae.checkpoint import save_csv
from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.plotting import new_figure, save_figure

from .findings import Finding, Section, Table
from .html import write_json

REAL, ALONE = "k real alone", "generated alone"
GENERATED, MORE = "+ generated", "+ more real"
DUPLICATES, SHIFTED, MASKED = "+ duplicates", "+ time-shifted", "+ masked"
ARMS = (REAL, GENERATED, DUPLICATES, SHIFTED, MASKED, ALONE, MORE)
CONTROLS = (REAL, DUPLICATES, SHIFTED, MASKED)
LEARNED = 0.9  # of its own images a classifier that has learned enough names right


def interval_over_seeds(means: np.ndarray) -> tuple[float, float] | None:
    """95 % of the mean of (seeds,) by Student's t; None for a single seed."""
    if len(means) < 2:
        return None
    half = student.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))
    return float(means.mean() - half), float(means.mean() + half)


class Over(NamedTuple):
    """What an arm adds to a control, in accuracy on held-out real images; that of the same seed is subtracted."""

    gain: float
    interval: tuple[float, float] | None  # 95 %, over seeds
    more_real: float | None  # what n more real images add to the same control, where there are so many

    def __str__(self) -> str:
        if not self.interval:
            return f"{100 * self.gain:+.1f}"
        return f"{100 * self.gain:+.1f} ({100 * self.interval[0]:+.1f} to {100 * self.interval[1]:+.1f})"


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What generated images add to k real ones beyond each control.

    No control is chosen: whichever was best on these answers was partly lucky, and so looks too hard to beat.
    """

    k: int
    over: dict[str, Over]  # of each of CONTROLS

    @property
    def shown(self) -> int:
        """1 if above every control, -1 if below k real images alone, each by its whole interval; else 0."""
        spans = {control: over.interval or (0.0, 0.0) for control, over in self.over.items()}
        return int(all(low > 0 for low, _ in spans.values())) - int(spans[REAL][1] < 0)

    def __str__(self) -> str:
        words = {1: "help", 0: "are not shown to help", -1: "harm"}[self.shown]
        verdict, span = f"generated images {words}", ", 95 % over seeds"
        if not self.over[REAL].interval:
            verdict, span = "no verdict", "; one seed, no interval"
        gains = ", ".join(f"{over} over {control}" for control, over in self.over.items())
        more = self.over[REAL].more_real
        real = "" if more is None else f"; as many more real images: {100 * more:+.1f} over {REAL}"
        return f"k = {self.k}: {verdict}; points gained: {gains}{span}{real}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """The accuracy of every arm at every k."""

    accuracy: dict[int, dict[str, np.ndarray]]  # k -> arm -> (seeds, users); NaN for users who are not held out
    users: list[str]
    about: dict[str, Any]

    def means(self, k: int, arm: str) -> np.ndarray:
        """Accuracy of each seed, a mean over users: (seeds,)."""
        return np.nanmean(self.accuracy[k][arm], axis=1)

    @property
    def gains(self) -> list[Gain]:
        """Of every k."""
        return [Gain(k=k, over={control: self._over(k, control) for control in CONTROLS}) for k in self.accuracy]

    def _over(self, k: int, control: str) -> Over:
        gain = self.means(k, GENERATED) - self.means(k, control)
        more = float((self.means(k, MORE) - self.means(k, control)).mean()) if MORE in self.accuracy[k] else None
        return Over(float(gain.mean()), interval_over_seeds(gain), more)

    @property
    def verdict(self) -> str:
        """One sentence: where generated images help."""
        if self.about["seeds"] == 1:
            return "no verdict: one seed has no interval; give --seeds 3 or more"
        helps, harms = ([f"{gain.k}" for gain in self.gains if gain.shown == sign] for sign in (1, -1))
        words = f"help beyond every control at k = {', '.join(helps)}" if helps else "are not shown to help at any k"
        return f"generated images {words}" + (
            f", and harm, below k real alone, at k = {', '.join(harms)}" if harms else ""
        )

    @property
    def notes(self) -> list[str]:
        """What to beware of."""
        about = self.about
        available, n = about["real_per_user"], about["generated_per_user"]
        notes = [
            f"{n} generated images a user; at each k all arms learn from equally many batches: "
            + ", ".join(f"{steps} at k = {k}" for k, steps in about["steps"].items()),
        ]
        if about["seeds"] > 1:
            notes += [
                "help: the whole interval above 0 over every control; harm: below 0 over k real images alone",
                "intervals: Student's t over seeds, which draw the k images; the held-out and the generated images, and"
                " the generator, are the same throughout",
            ]
        if about.get("heldout_in_training"):
            notes.append(
                f"{about['heldout_in_training']} of {about['heldout_images']} held-out images are also training images,"
                " pixel for pixel: accuracies are too high, most where real images are many"
            )
        if min(self.accuracy) < available:
            notes.append(
                f"a generator that learned from all of --real_dir has seen {available} images a user or more: at a"
                " smaller k it knows more real images than the classifier does, which favours generated ones. For a"
                " clean study train the generator on k images a user, give these as --real_dir, and --ks k"
            )
        if about["augmented"]:
            notes.append(
                "the classifier itself shifts every batch along time and varies its gain (--augment False: not at all),"
                " so that time-shifted copies bring it nothing new"
            )
        weak = [f"{share:.0%} at k = {k}" for k, share in about.get("right_of_own", {}).items() if share < LEARNED]
        if weak:
            notes.append(
                f"undertrained: {REAL} names only part of the very images that it learned from, {', '.join(weak)};"
                " give more --epochs or --steps before believing any arm"
            )
        if about["seeds"] == 2:
            notes.append(
                "two seeds: each interval rests on one difference, so its width is luck; give --seeds 3 or more"
            )
        return notes

    def rows(self) -> list[dict[str, Any]]:
        """One for each k and arm."""
        rows = []
        for k, arms in self.accuracy.items():
            n = self.about["generated_per_user"]
            images = {REAL: k, ALONE: n}
            for arm in (arm for arm in ARMS if arm in arms):
                means = self.means(k, arm)
                low, high = interval_over_seeds(means) or (None, None)
                row = {"k": k, "arm": arm, "images_per_user": images.get(arm, k + n), "steps": self.about["steps"][k]}
                row |= {"accuracy": float(means.mean()), "low": low, "high": high}
                rows.append(row | {f"seed_{i}": float(mean) for i, mean in enumerate(means)})
        return rows

    def table(self) -> Table:
        """Arms by k."""
        cells = {(row["arm"], row["k"]): _cell(row) for row in self.rows()}
        rows = [[arm, *(cells.get((arm, k), "-") for k in self.accuracy)] for arm in ARMS]
        return Table(
            title="accuracy on held-out real images, mean over users"
            + (" and seeds, 95 % over seeds" if self.about["seeds"] > 1 else ", one seed"),
            header=["learns from", *(f"k = {k}" for k in self.accuracy)],
            rows=rows,
        )

    def section(self) -> Section:
        """For a report: 0 is the control, `real` what as many more real images add to it."""
        findings = [
            Finding(
                name=f"k = {gain.k}, over {control}",
                value=over.gain,
                real=over.more_real,
                worst=0.0,
                interval=over.interval,
                form="{:+.1%}",
                about=f"what generated images add to {gain.k} real ones a user beyond the control",
            )
            for gain in self.gains
            for control, over in gain.over.items()
        ]
        return Section(
            title="Augmentation",
            findings=findings,
            tables=[self.table()],
            notes=[self.verdict, *self.notes],
            data={"rows": self.rows()},
        )

    def __str__(self) -> str:
        table = self.table()
        lines = [
            f"{words[0]:<18}" + "".join(f"{word:>16}" for word in words[1:]) for words in (table.header, *table.rows)
        ]
        lines = [table.title, *lines, f"chance: {1 / len(self.users):.1%}", *map(str, self.gains)]
        return "\n".join([*lines, self.verdict, *(f"note: {note}" for note in self.notes)])

    def save(self, folder) -> list[Path]:
        """Write study.json and study.csv; returns where."""
        folder = Path(folder)
        rows, places = self.rows(), [folder / "study.json", folder / "study.csv"]
        per_user = {
            f"{k}": {arm: right.mean(axis=0) for arm, right in arms.items()} for k, arms in self.accuracy.items()
        }
        found = {
            "verdict": self.verdict,
            "gains": [
                {"k": gain.k, "over": {name: over._asdict() for name, over in gain.over.items()}, "in_words": str(gain)}
                for gain in self.gains
            ],
            "rows": rows,
            "users": self.users,
            "accuracy_per_user": per_user,
            "about": self.about,
            "notes": self.notes,
        }
        write_json(places[0], found)
        save_csv([list(rows[0]), *(["" if x is None else x for x in row.values()] for row in rows)], places[1])
        return places

    def plot(self, path) -> bool:
        """Draw accuracy over k as a PNG; False, and nothing is drawn, without matplotlib (the extra [plots])."""
        try:
            figure = new_figure(7, 4.5, layout="constrained")
        except UserError:
            return False
        axes = figure.subplots()
        for arm in ARMS:
            rows = [row for row in self.rows() if row["arm"] == arm]
            if not rows:
                continue
            x, y = ([row[key] for row in rows] for key in ("k", "accuracy"))
            wide = arm == GENERATED
            style = {"linestyle": "--"} if arm in (ALONE, MORE) else {}
            (line,) = axes.plot(x, y, "o", ls=style.get("linestyle", "-"), lw=2.5 if wide else 1.2, ms=4, label=arm)
            if wide and rows[0]["low"] is not None:
                low, high = ([row[key] for row in rows] for key in ("low", "high"))
                axes.fill_between(x, low, high, alpha=0.2, color=line.get_color(), lw=0)
        seeds = self.about["seeds"]
        axes.axhline(1 / len(self.users), linestyle=":", color="grey", label="chance")
        axes.set(
            xlabel="k, real images of each user",
            ylabel="accuracy on held-out real images",
            title=f"{self.about['generated_per_user']} generated images a user, {seeds} seed{'s' if seeds > 1 else ''}",
            xticks=list(self.accuracy),
            ylim=(0, None),
        )
        axes.legend(fontsize=8)
        save_figure(figure, path, dpi=110)
        return True


def _cell(row) -> str:
    value = f"{100 * row['accuracy']:.1f}%"
    return value if row["low"] is None else f"{value} ±{100 * (row['high'] - row['low']) / 2:.1f}"
