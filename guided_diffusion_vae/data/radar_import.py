"""From recordings of a radar to folders of pictures that a network can be trained on.

A picture of duration D at time t needs the baseband from t - W to t + D + W, W the length of the window: its columns
are the spectra at t to t + D. So a recording of length T gives pictures at W, W + hop, ... up to T - D - W.
A spectrogram has its columns already: there W is 0.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter1d

from ..checkpoint import atomic_write, save_csv
from ..config import UserError, first_few
from .image_folder import list_files, refuse
from .microdoppler import VELOCITY_MPS, WINDOW_S, claim_folder
from .radar_files import EXTENSIONS, BadFile, Recording, RecordingConfig, read_recording
from .radar_sessions import SPLITS, Picture, Source, Take, find_sources, plan_pictures
from .spectrogram import (
    colour_table,
    colours_from_unit,
    db_re_peak,
    doppler_hz,
    row_axis,
    stft_power,
    unit_from_db,
    velocity_mps,
)

CLUTTER_MPS = 0.12  # standard deviation of the notch at 0, as the simulator's
ENERGY = 0.999  # of what moves: says where the torso is, a hint for another --max_velocity
SILENT = 1e-6  # of a recording's largest value: less is rounding
SHOWN = 40  # users in the overview


@dataclass(frozen=True, kw_only=True)
class ImportConfig(RecordingConfig):
    """How recordings become pictures."""

    out_dir: str = ""  # where train/, val/, test/, manifest.csv and axes.yaml go
    image_size: int = 64  # side of the pictures in pixels
    duration_s: float = 3.0  # time that a picture spans
    hop_s: float = 0.0  # from picture to picture of a recording; 0: its duration, so that they do not overlap
    window_s: float = 0.0  # length of the Gaussian window, 2.5 standard deviations; 0: by the carrier
    max_velocity: float = 0.0  # top of the axis in m/s; 0: 6.5, which holds all of a walk, or what the PRF allows
    min_velocity: float = 0.0  # bottom of the axis in m/s, negative; 0: minus --max_velocity
    mti: bool = True  # subtract a moving average from baseband, and so all that stands still
    floor_db: float = -45.0  # the darkest colour, in dB re the picture's peak
    ceil_db: float = 0.0  # the brightest
    colormap: str = "jet"  # jet, viridis, parula or grey
    val_sessions: str = ""  # names, such as day3,day4; without any, the last but one of every user
    test_sessions: str = ""  # names; without any, the last of every user
    skip_bad_files: bool = False  # leave out recordings that cannot be used instead of refusing
    plot: bool = False  # overview.png: a row a user, with axes

    def __post_init__(self):
        super().__post_init__()
        for name, least in {"hop_s": 0.01, "window_s": 0.001, "max_velocity": 0.01}.items():
            if getattr(self, name) != 0 and not least <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least {least}, or 0 to be chosen")
        for name, least in {"image_size": 8, "duration_s": 0.1}.items():
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least {least}")
        if not -math.inf < self.min_velocity <= 0 or (self.min_velocity and not self.max_velocity):
            raise UserError(f"--min_velocity is {self.min_velocity}; it must be below 0, and needs --max_velocity")
        if not -math.inf < self.floor_db < self.ceil_db < math.inf:
            raise UserError(f"--floor_db is {self.floor_db}; it must be below --ceil_db {self.ceil_db}")
        colour_table(self.colormap)


class Survey(NamedTuple):
    """What a recording holds, without its samples."""

    recording: Recording  # its data are left out
    window_s: float
    take: Take
    spectrum: np.ndarray  # (F,) mean power over Doppler, from +PRF/2 down to -PRF/2

    @property
    def limit_mps(self) -> float:
        """The velocity of half the PRF."""
        return velocity_mps(self.recording.prf_hz / 2, self.recording.carrier_ghz)


def import_recordings(config: ImportConfig, say: Callable[[str], object] = print) -> Path:
    """Write `train|val|test/USER/NAME_k.png`, `axes.yaml` and, last, `manifest.csv`; the same files every time.

    Raises:
        UserError: no recordings, or bad ones; a parameter is missing; --out_dir holds other pictures.
    """
    if not config.out_dir:
        raise UserError("--out_dir is empty; say where the pictures go")
    root, data = Path(config.out_dir), Path(config.data_dir)
    if config.data_dir and data.resolve() in (root.resolve(), *root.resolve().parents):
        raise UserError(f"--out_dir {root} lies in --data_dir {data}: choose a folder outside of it")
    sources = find_sources(config.data_dir, (config.extension,) if config.extension else EXTENSIONS)
    surveys = survey_all(config, sources, say)
    plan = plan_pictures([survey.take for survey in surveys], config.val_sessions, config.test_sessions, say)
    edges = choose_edges(config, surveys, plan, say)
    _refuse_strangers(root, {picture.file for pictures in plan.values() for picture in pictures})
    claim_folder(replace(config, plot=False))
    rows = [row for survey in surveys for row in _write_pictures(config, survey, plan[survey.take.source], edges)]
    _write_axes(config, surveys, edges)
    if config.plot:
        _save(overview(rows, root, edges, config.duration_s), root / "overview.png")
    save_csv([list(rows[0]), *(list(row.values()) for row in rows)], root / "manifest.csv")
    counts = Counter(row["split"] for row in rows)
    shares = ", ".join(f"{split} {counts[split]}" for split in SPLITS)
    say(f"{len(rows)} pictures of {len({row['user'] for row in rows})} users in {root}: {shares}")
    return root


def survey_all(config: ImportConfig, sources: list[Source], say) -> list[Survey]:
    """Read every recording once; bad ones are refused, or named and left out."""
    surveys, bad, notes = [], [], Counter()
    for source in sources:
        try:
            surveys.append(_survey(config, source))
            notes.update(surveys[-1].recording.notes)
        except BadFile as error:
            bad.append(str(error))
    if not surveys or not config.skip_bad_files:
        refuse(bad, len(sources), "recordings", "--skip_bad_files")
    if bad:
        say(f"left out {len(bad)} of {len(sources)} recordings: {first_few(bad, between='; ')}")
    for note, count in notes.items():
        say(f"{count} of {len(surveys)} recordings: {note}")
    return surveys


def _survey(config: ImportConfig, source: Source) -> Survey:
    raw = read_recording(source.path, config)
    window_s = config.window_s or window_for(raw.carrier_ghz)
    if raw.kind == "iq" and 2 * window_s * raw.prf_hz < 8:
        raise UserError(f"{source.path} has {raw.prf_hz:g} pulses a second: --window_s {window_s:g} is too short")
    count, margin_s = _samples(config, raw, window_s)
    hop, spare = (config.hop_s or config.duration_s) * raw.rate_hz, raw.data.shape[-1] - count
    if spare < 0 or count < 2:
        length, need = raw.data.shape[-1] / raw.rate_hz, count / raw.rate_hz
        raise BadFile(
            f"{source.path} is {length:.2f} s long, a picture needs {need:.2f} s: choose --duration_s, or remove it"
        )
    moving = prepared(config, raw)
    firsts = [round(k * hop) for k in range(int(spare / hop + 1e-9) + 1)]
    level = np.abs(moving.data).reshape(-1, moving.data.shape[-1]).max(axis=0)  # (T,)
    heard = [first for first in firsts if (level[first : first + count] > SILENT).mean() > 0.5]
    if not heard:
        raise BadFile(f"{source.path} holds nothing that moves: remove it, or give --mti False")
    notes = (
        raw.notes
        if len(heard) == len(firsts)
        else (*raw.notes, "pictures that were silent for half of their time are left out")
    )
    power, half = moving.data, raw.prf_hz / 2
    if raw.kind == "iq":
        power = stft_power(power, size=256, edges_hz=(-half, half), prf_hz=raw.prf_hz, window_s=window_s)
    starts = tuple(first / raw.rate_hz + margin_s for first in heard)
    take = Take(source, starts, config.duration_s + 2 * window_s)
    return Survey(raw._replace(data=np.empty(0), notes=notes), window_s, take, power.mean(axis=1))


def window_for(carrier_ghz: float) -> float:
    """The simulator's window, between its carriers by the logarithm: a leg's swing lasts 0.4 s at any carrier."""
    known = sorted(WINDOW_S.items())
    return float(np.interp(np.log(carrier_ghz), [np.log(ghz) for ghz, _ in known], [length for _, length in known]))


def _samples(config, recording: Recording, window_s: float) -> tuple[int, float]:
    """How many samples a picture takes, and how long before its first column they begin."""
    margin_s = window_s if recording.kind == "iq" else 0.0
    return round((config.duration_s + 2 * margin_s) * recording.rate_hz), margin_s


# ---- pictures --------------------------------------------------------------------------------------------------------


def choose_edges(config: ImportConfig, surveys: list[Survey], plan, say) -> tuple[float, float]:
    """What the rows of all pictures span in m/s, bottom to top.

    A PRF tells velocities apart over an axis as long as itself, wherever that begins: two thirds of it may be given to
    approach. A spectrogram has been cut at half the PRF already.
    """
    lowest = min(surveys, key=lambda survey: survey.limit_mps)
    limit, low, high = lowest.limit_mps, config.min_velocity or -config.max_velocity, config.max_velocity
    if not high:
        high = min(limit, VELOCITY_MPS[1])
        training = [survey for survey in surveys if any(p.split == "train" for p in plan[survey.take.source])]
        say(
            f"--max_velocity {high:.4g}: the PRF allows {limit:.4g} m/s; {ENERGY:.1%} of the energy lie within"
            f" {_fastest(training, limit):.2g} m/s, and legs, which are weaker, move up to three times as fast"
        )
        return -high, high
    cut = min((survey.limit_mps for survey in surveys if survey.recording.kind == "power"), default=math.inf)
    if high - low > 2 * limit * (1 + 1e-9) or max(high, -low) > cut * (1 + 1e-9):
        raise UserError(
            f"--max_velocity is {high:g}, but the PRF of {lowest.take.source.path} allows {-limit:.4g} to {limit:.4g}"
            " m/s: give less, or for baseband of people who walk one way a --min_velocity nearer to 0"
        )
    return low, high


def _fastest(surveys: list[Survey], limit: float) -> float:
    """The speed below which ENERGY of the power above the noise floor lies, over all recordings."""
    speed = (np.arange(256) + 0.5) / 256 * limit
    total = np.zeros(256)
    for survey in surveys:
        velocity = row_axis(len(survey.spectrum), (-survey.limit_mps, survey.limit_mps))[::-1]
        both = [np.interp(sign * speed, velocity, survey.spectrum[::-1]) for sign in (1, -1)]
        total += sum(both) / survey.spectrum.sum()
    energy = np.cumsum(np.maximum(total - np.median(total), 0))
    return float(speed[np.searchsorted(energy, ENERGY * energy[-1])]) if energy[-1] else limit


def prepared(config: ImportConfig, recording: Recording) -> Recording:
    """The recording without what stands still: baseband less its Gaussian moving average.

    In frequency that is the gain 1 - exp(-v^2 / (2 CLUTTER_MPS^2)), so a standing target is lost and a walk is not.
    """
    if recording.kind != "iq" or not config.mti:
        return recording
    spread = recording.prf_hz / (2 * np.pi * doppler_hz(CLUTTER_MPS, recording.carrier_ghz))
    data = recording.data.astype(np.complex128)
    return recording._replace(data=(data - gaussian_filter1d(data, spread, mode="nearest")).astype(np.complex64))


def picture_power(config: ImportConfig, recording: Recording, start_s: float, edges, window_s: float) -> np.ndarray:
    """Power (size, size) of one picture, rows from the fastest approach down, columns from `start_s` on."""
    size = config.image_size
    edges_hz = tuple(doppler_hz(velocity, recording.carrier_ghz) for velocity in edges)
    count, margin_s = _samples(config, recording, window_s)
    first = round((start_s - margin_s) * recording.rate_hz)
    if recording.kind == "iq":
        stretch = recording.data[first : first + count]
        return stft_power(stretch, size=size, edges_hz=edges_hz, prf_hz=recording.prf_hz, window_s=window_s)
    rows = len(recording.data)
    bottom, top = (float(np.clip(0.5 - edge / recording.prf_hz, 0, 1)) * rows for edge in edges_hz)
    image = Image.fromarray(recording.data.astype(np.float32))  # its box averages power where pixels are coarser
    return np.asarray(image.resize((size, size), Image.Resampling.BOX, box=(first, top, first + count, bottom)))


def _write_pictures(config: ImportConfig, survey: Survey, pictures: list[Picture], edges) -> list[dict]:
    """Write the pictures of a recording; returns their rows of the manifest."""
    if not pictures:
        return []
    source, rows = survey.take.source, []
    recording = prepared(config, read_recording(source.path, config))
    about = {"user": source.user, "session": source.session}
    about |= {"source": source.path.relative_to(config.data_dir).as_posix()}
    units = {"duration_s": config.duration_s, "velocity_low_mps": f"{edges[0]:.6g}"}
    units |= {"velocity_high_mps": f"{edges[1]:.6g}", "floor_db": config.floor_db, "ceil_db": config.ceil_db}
    units |= {"prf_hz": f"{recording.prf_hz:.10g}", "carrier_ghz": f"{recording.carrier_ghz:.10g}"}
    units |= {"window_s": f"{survey.window_s:.6g}", "colormap": config.colormap}
    for picture in pictures:
        db = db_re_peak(picture_power(config, recording, picture.start_s, edges, survey.window_s))
        pixels = colours_from_unit(unit_from_db(db, config.floor_db, config.ceil_db), config.colormap)
        _save(Image.fromarray(pixels), Path(config.out_dir) / picture.file)
        rows.append(
            {"file": picture.file, "split": picture.split, **about, "start_s": f"{picture.start_s:.4f}", **units}
        )
    return rows


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as handle:
        image.save(handle, format="PNG")


def _refuse_strangers(root: Path, files: set[str]) -> None:
    """Raise for pictures of other recordings: what was a test session then may be a training session now."""
    for split in SPLITS:
        for path in list_files(root / split) if (root / split).is_dir() else ():
            if path.relative_to(root).as_posix() not in files:
                raise UserError(f"--out_dir {root} holds {path.relative_to(root)} of other recordings: choose another")


def _write_axes(config: ImportConfig, surveys: list[Survey], edges) -> None:
    """`axes.yaml`: what a pixel is, for plots in m/s and s."""
    radar = {name: sorted({getattr(s.recording, name) for s in surveys}) for name in ("carrier_ghz", "prf_hz")}
    radar |= {"window_s": sorted({s.window_s for s in surveys})}
    axes = {name: values[0] if len(values) == 1 else values for name, values in radar.items()}
    axes |= {"velocity_mps": list(edges), "rows": "fastest approach first", "duration_s": config.duration_s}
    axes |= {"mps_per_row": (edges[1] - edges[0]) / config.image_size, "db": [config.floor_db, config.ceil_db]}
    axes |= {"s_per_column": config.duration_s / config.image_size, "image_size": config.image_size}
    with atomic_write(Path(config.out_dir) / "axes.yaml") as handle:
        handle.write(yaml.safe_dump(axes | {"colormap": config.colormap}, sort_keys=False).encode())


def overview(rows: list[dict], root: Path, edges, duration_s: float) -> Image.Image:
    """A row a user: the first picture of each split, with axes in m/s and s."""
    first = {}
    for row in rows:
        first.setdefault((row["user"], row["split"]), row["file"])
    users = sorted({user for user, _ in first})[:SHOWN]
    side, left, top = 192, 56, 34  # room for numbers on the left, words above, numbers below
    sheet = Image.new("RGB", (3 * (side + left) + 8, len(users) * (side + 2 * top)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, user in enumerate(users):
        for column, split in enumerate(split for split in SPLITS if (user, split) in first):
            x, y = left + column * (side + left), top + line * (side + 2 * top)
            with Image.open(root / first[user, split]) as image:
                sheet.paste(image.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (x, y))
            draw.text((x, y - 14), f"{user} {split}".encode("ascii", "replace").decode(), fill="black")
            draw.text((x - left + 2, y - 14), "m/s", fill="black")
            for place in range(5):  # of the axes, from top and from left
                velocity = edges[1] - (edges[1] - edges[0]) * place / 4
                draw.text((x - 6, y + side * place / 4), f"{velocity:+.3g}", fill="black", anchor="rm")
                word = f"{duration_s * place / 4:.3g}" + (" s" if place == 4 else "")
                draw.text((x + side * place / 4, y + side + 4), word, fill="black", anchor="ma")
    return sheet
