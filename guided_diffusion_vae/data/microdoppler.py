"""A radar looks at a walking person: the built-in data set of micro-Doppler spectrograms.

The body is sixteen ellipsoids between the joints of `gait.walk`, each carrying a few scatterers. The received baseband
is their sum, and the picture its short-time spectrum along the radial velocity v = f lambda / 2, approach positive:

    s(t) = sum_k g_k sqrt(sigma_k(t)) / R_k(t)^2 exp(-4 pi j R_k(t) / lambda) + clutter + noise

A person is drawn from (seed, user), a session from (seed, user, session) and a walk from (seed, user, session, index),
so a data set is the same however many processes make it. Sources: Chen, The Micro-Doppler Effect in Radar (2011);
Boulic et al. (1990). The gains follow measured 77 GHz spectrograms; noise is about 8 dB weaker than in those.
"""

import contextlib
import csv
import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import yaml
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from tqdm import tqdm

from ..checkpoint import atomic_write
from ..config import UserError, read_yaml
from .gait import Walker, walk
from .spectrogram import colour_table, colours_from_unit, db_re_peak, doppler_hz, row_axis, stft_power, unit_from_db

WINDOW_S = {77.0: 0.10, 24.0: 0.14, 5.8: 0.20}  # length of the Gaussian window: a leg's swing lasts 0.4 s
VELOCITY_MPS = (-3.25, 6.5)  # what the rows span, bottom to top
RADAR_HEIGHT_M = 1.0
BODY_RATE_HZ = 400.0  # instants a second at which the body is posed
SESSIONS = {"train": (0, 1), "val": (2,), "test": (3,)}

# joint, joint, semi-axis [m], gain [dB], scatterers. Feet are weak (the model lifts them too fast), the torso strong:
# measured leg peaks lie 24 to 30 dB below the torso line.
BODY = [("neck", "head", 0.10, 0.0, 2), ("base", "neck", 0.15, 8.0, 5)]
for _side in ("right", "left"):
    BODY += [
        ("neck", f"{_side}_shoulder", 0.06, -2.0, 2),
        (f"{_side}_shoulder", f"{_side}_elbow", 0.06, -7.0, 3),
        (f"{_side}_elbow", f"{_side}_hand", 0.05, -7.0, 3),
        ("base", f"{_side}_hip", 0.07, 0.0, 2),
        (f"{_side}_hip", f"{_side}_knee", 0.07, -4.0, 4),
        (f"{_side}_knee", f"{_side}_ankle", 0.06, -5.0, 5),
        (f"{_side}_ankle", f"{_side}_toe", 0.05, -10.0, 3),
    ]


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """A simulated data set."""

    out_dir: str = ""  # where train/, val/, test/ and manifest.csv go
    num_users: int = 31  # persons
    train_images: int = 24  # images per person in train/, from two sessions
    val_images: int = 4  # images per person in val/, from a third session
    test_images: int = 6  # images per person in test/, from a fourth session
    image_size: int = 64  # side of the pictures in pixels
    carrier_ghz: float = 24.0  # radar: 77, 24 or 5.8
    duration_s: float = 3.0  # time that a picture spans
    clip_db: float = 45.0  # dynamic range of the colours below the peak
    colormap: str = "jet"  # jet, viridis, parula or grey
    seed: int = 0  # other seeds are other persons
    workers: int = 0  # processes; 0 = one a core

    def __post_init__(self):
        least = {"num_users": 1, "train_images": 0, "val_images": 0, "test_images": 0}
        least |= {"image_size": 8, "duration_s": 1.0, "clip_db": 1.0, "seed": 0, "workers": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least {bound}")
        if self.carrier_ghz not in WINDOW_S:
            raise UserError(f"--carrier_ghz is {self.carrier_ghz:g}; it must be one of 77, 24, 5.8")
        if self.train_images + self.val_images + self.test_images == 0:
            raise UserError("--train_images, --val_images and --test_images are all 0; nothing would be simulated")
        colour_table(self.colormap)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One walk in front of the radar."""

    walker: Walker
    places: tuple[float, ...]  # of the scatterers along their segments, in [0, 1]
    strengths: tuple[float, ...]  # amplitude of each scatterer: build, clothes
    phase: float = 0.0  # of the right leg when the picture starts, in cycles
    range_m: float = 9.0
    heading_deg: float = 0.0  # 0: straight at the radar
    snr_db: float = 20.0
    clutter_db: float = 0.0  # residual static clutter, re signal
    stride_jitter: float = 0.015  # spread of the time of a cycle


def stream(*numbers) -> np.random.Generator:
    """The generator of a thing that these integers name."""
    return np.random.default_rng(list(numbers))


def spread(gains) -> np.ndarray:
    """A value for each segment, repeated for each of its scatterers."""
    return np.repeat(gains, [count for *_, count in BODY])


def draw_person(seed: int, user: int) -> tuple[Walker, np.ndarray, np.ndarray]:
    """Who user number `user` is: a gait, and where and how strongly the body scatters."""
    rng = stream(seed, user)
    walker = Walker(
        height_m=float(np.clip(rng.normal(1.72, 0.085), 1.50, 1.95)),
        relative_speed=float(np.clip(rng.normal(1.45, 0.17), 1.0, 1.95)),
        cadence_factor=float(rng.normal(1, 0.04)),
        arm_swing=float(rng.uniform(0.4, 1.6)),
        hip_asymmetry=float(rng.normal(0, 0.05)),
        knee_factor=float(rng.normal(1, 0.06)),
        sway=float(rng.uniform(0.6, 1.5)),
    )
    gains = np.exp(rng.normal(0, 0.25, len(BODY)))
    counts = np.array([count for *_, count in BODY])
    order = np.concatenate([np.arange(count) for count in counts])
    places = (order + rng.uniform(0, 1, len(order))) / spread(counts)
    strengths = rng.rayleigh(np.sqrt(0.5), len(order)) / np.sqrt(spread(counts))
    return walker, places, strengths * spread(gains)


def draw_scene(seed: int, user: int, session: int, index: int) -> Scene:
    """One walk of a person: what the session changes (shoes, mood, coat), and what every walk does."""
    walker, places, strengths = draw_person(seed, user)
    day = stream(seed, user, 1, session)
    walker = replace(
        walker,
        relative_speed=walker.relative_speed * day.normal(1, 0.06),
        arm_swing=max(0.0, walker.arm_swing + day.normal(0, 0.25)),
        cadence_factor=walker.cadence_factor * day.normal(1, 0.015),
    )
    gains = np.exp(day.normal(0, 0.25, len(BODY)))
    rng = stream(seed, user, 2, session, index)
    walker = replace(
        walker,
        relative_speed=float(np.clip(walker.relative_speed * rng.normal(1, 0.03), 0.6, 2.6)),
        arm_swing=float(walker.arm_swing * rng.normal(1, 0.08)),
    )
    gains = gains * np.exp(rng.normal(0, 0.08, len(BODY)))
    return Scene(
        walker=walker,
        places=tuple(places),
        strengths=tuple(strengths * spread(gains)),
        phase=float(rng.uniform()),
        range_m=float(rng.uniform(7, 11)),
        heading_deg=float(rng.uniform(-10, 10)),
        snr_db=float(rng.uniform(20, 32)),  # 12 to 25 is common, and hides the legs in a good part of the pictures
        clutter_db=float(rng.uniform(-16, -4)),
    )


def echo(scene: Scene, rng, *, carrier_ghz: float, duration_s: float, prf_hz: float) -> np.ndarray:
    """The received baseband without noise: complex64 (duration * prf,).

    Args:
        rng: for the timing of strides.
    """
    pulses = round(duration_s * prf_hz)
    factor = max(1, int(prf_hz / BODY_RATE_HZ))  # bodies move slowly: few instants, refined to every pulse
    time_s = np.arange(-(-pulses // factor) + 3) * factor / prf_hz
    walking = walk(scene.walker, time_s, scene.phase + strides(scene, rng, time_s))
    joints = {name: seen_from_radar(points, scene) for name, points in walking.items()}

    baseband, first = np.zeros(pulses, dtype=np.complex64), 0
    for start, end, axis, gain_db, count in BODY:
        places, strengths = (np.array(part[first : first + count]) for part in (scene.places, scene.strengths))
        along = joints[end] - joints[start]  # (T, 3)
        sight = joints[start] + places[:, None, None] * along  # (count, T, 3)
        distance = np.sqrt(dot(sight, sight))
        strengths = 10 ** (gain_db / 20) * strengths[:, None]
        amplitude = strengths * np.sqrt(cross_section(along, sight, axis)) / distance**2
        cycles = doppler_hz(1.0, carrier_ghz) * refine(distance, factor)[:, :pulses]
        angle = (2 * np.pi * (cycles - np.rint(cycles))).astype(np.float32)  # whole cycles go before the precision
        amplitude = refine(amplitude, factor)[:, :pulses].astype(np.float32)
        baseband.real += (amplitude * np.cos(angle)).sum(axis=0)
        baseband.imag -= (amplitude * np.sin(angle)).sum(axis=0)
        first += count
    return baseband


def refine(values, factor: int) -> np.ndarray:
    """Values (..., T) at `factor` times as many instants, from the second to the last but one: (..., (T - 3) * factor).

    Between two instants runs the cubic of Catmull and Rom: through both, with the slopes of their neighbours' chords.
    """
    f = np.arange(factor) / factor
    weights = np.array([-f + 2 * f**2 - f**3, 2 - 5 * f**2 + 3 * f**3, f + 4 * f**2 - 3 * f**3, f**3 - f**2]) / 2
    return (sliding_window_view(values, 4, axis=-1) @ weights).reshape(*values.shape[:-1], -1)


def seen_from_radar(points, scene: Scene) -> np.ndarray:
    """Points (T, 3) of a walk along +x, from the radar: it starts `range_m` away and heads for it, or a little past."""
    heading = np.pi - np.radians(scene.heading_deg)
    turned = np.array([[np.cos(heading), -np.sin(heading), 0], [np.sin(heading), np.cos(heading), 0], [0, 0, 1]])
    return points @ turned.T + np.array([scene.range_m, 0, -RADAR_HEIGHT_M])


def strides(scene: Scene, rng, time_s) -> np.ndarray:
    """Cycles done at each time: every cycle takes its own, slightly different time."""
    cycle = scene.walker.cycle_s
    count = int(time_s[-1] / cycle) + 3
    times = np.concatenate([[0], np.cumsum(cycle * rng.normal(1, scene.stride_jitter, count))])
    return np.interp(time_s, times, np.arange(count + 1))


def cross_section(along, sight, axis) -> np.ndarray:
    """Radar cross-section (..., T) in m^2 of an ellipsoid of revolution with long axis `along` seen along `sight`.

    pi a^4 c^2 / (a^2 sin^2 + c^2 cos^2)^2, c half the length, the angle between axis and line of sight (Chen 2011).
    """
    length2 = dot(along, along)
    cos2 = dot(along, sight) ** 2 / np.maximum(length2 * dot(sight, sight), 1e-12)
    a2, c2 = axis**2, length2 / 4
    return np.pi * a2**2 * c2 / (a2 * (1 - cos2) + c2 * cos2) ** 2


def dot(a, b) -> np.ndarray:
    """Products (...) of the vectors (..., 3)."""
    return np.einsum("...i,...i->...", a, b)


def prf_for(carrier_ghz: float) -> float:
    """Pulses per second at which the whole velocity axis is free of aliases, with a margin."""
    return 2.2 * max(map(abs, VELOCITY_MPS)) * doppler_hz(1.0, carrier_ghz)


def spectrogram_db(scene: Scene, rng, *, carrier_ghz=24.0, duration_s=3.0, size=64) -> np.ndarray:
    """One picture in decibels re its peak: (size, size)."""
    prf = prf_for(carrier_ghz)
    window_s = WINDOW_S[carrier_ghz]
    signal = echo(scene, rng, carrier_ghz=carrier_ghz, duration_s=duration_s + 2 * window_s, prf_hz=prf)
    level = np.sqrt(np.mean(np.abs(signal) ** 2))
    wander = np.cumsum(rng.normal(0, 0.3 / np.sqrt(prf), len(signal)))
    clutter = level * 10 ** (scene.clutter_db / 20) * np.exp(1j * (wander + rng.uniform(0, 2 * np.pi)))
    noise = rng.normal(size=(2, len(signal))) * level * 10 ** (-scene.snr_db / 20) / np.sqrt(2)
    received = (signal + clutter + noise[0] + 1j * noise[1]).astype(np.complex64)
    low_hz, high_hz = (doppler_hz(velocity, carrier_ghz) for velocity in VELOCITY_MPS)
    power = stft_power(received, size=size, edges_hz=(low_hz, high_hz), prf_hz=prf, window_s=window_s)
    return db_re_peak(power * moving_target_filter(size)[:, None])


def moving_target_filter(rows: int) -> np.ndarray:
    """Power gain (rows,) of the filter that removes what does not move: a notch 0.12 m/s wide, 30 dB deep."""
    velocity = row_axis(rows * 16, VELOCITY_MPS)
    gain = 1 - (1 - 10**-1.5) * np.exp(-0.5 * (velocity / 0.12) ** 2)
    return (gain**2).reshape(rows, 16).mean(axis=1)


# ---- a data set ------------------------------------------------------------------------------------------------------


def render(config: SimulationConfig, user: int, session: int, index: int) -> tuple[np.ndarray, Scene]:
    """The picture (size, size, 3) uint8 with this name, and its scene."""
    scene = draw_scene(config.seed, user, session, index)
    rng = stream(config.seed, user, 3, session, index)
    size, carrier = config.image_size, config.carrier_ghz
    db = spectrogram_db(scene, rng, carrier_ghz=carrier, duration_s=config.duration_s, size=size)
    return colours_from_unit(unit_from_db(db, -config.clip_db, 0.0), config.colormap), scene


def plan(config: SimulationConfig) -> list[tuple[str, int, int, int]]:
    """(split, user, session, index) of every picture; the sessions of a split take turns."""
    counts = {"train": config.train_images, "val": config.val_images, "test": config.test_images}
    return [
        (split, user, SESSIONS[split][i % len(SESSIONS[split])], i)
        for split, count in counts.items()
        for user in range(config.num_users)
        for i in range(count)
    ]


def simulate_dataset(config: SimulationConfig) -> Path:
    """Write `train|val|test/user_XX/user_XX_sSS_NNNN.png` and, last, `manifest.csv` with the ground truth.

    Pictures that are there already are not made again, so an interrupted run goes on.

    Raises:
        UserError: the folder holds pictures that other settings made.
    """
    jobs = plan(config)
    root = claim_folder(config)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(config.workers or cores or 1, len(jobs))
    with one_thread_a_process(), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        made = pool.map(_make, [config] * len(jobs), jobs, chunksize=16)
        rows = list(tqdm(made, total=len(jobs), desc="simulating", unit="image"))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["file"])
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(root / "manifest.csv") as handle:
        handle.write(text.getvalue().encode())
    return root


@contextlib.contextmanager
def one_thread_a_process():
    """Processes started in this block do their matrix products in one thread: many would fight for the cores, and
    another number of threads is another order of additions, which now and then moves a colour by one level."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def claim_folder(config) -> Path:
    """Write the settings to `run.yaml` of an unused folder, or raise if those there are others; returns the folder.

    Args:
        config: a dataclass of settings, among them `out_dir`, the folder.
    """
    root = Path(config.out_dir)
    if root.exists() and not root.is_dir():
        raise UserError(f"--out_dir {root} is not a folder")
    root.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(config).items() if name not in ("out_dir", "workers")}
    record = root / "run.yaml"
    earlier = read_yaml(record) if record.exists() else settings
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise UserError(
                f"--{name} is {value}, but --out_dir {root} holds pictures made with {earlier.get(name)}: "
                "choose another folder, or remove this one"
            )
    with atomic_write(record) as handle:
        handle.write(yaml.safe_dump(settings, sort_keys=False).encode())
    return root


def _make(config: SimulationConfig, job) -> dict:
    split, user, session, index = job
    digits = max(2, len(str(config.num_users - 1)))  # sorted by name is sorted by number
    name = f"user_{user:0{digits}d}"
    file = Path(split) / name / f"{name}_s{session:02d}_{index:04d}.png"
    path = Path(config.out_dir) / file
    scene = draw_scene(config.seed, user, session, index)
    if not path.exists():
        pixels, scene = render(config, user, session, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as handle:
            Image.fromarray(pixels).save(handle, format="PNG")
    walker = scene.walker
    truth = {"file": file.as_posix(), "split": split, "user": user, "session": session, "index": index}
    truth |= {"seed": config.seed, "carrier_ghz": config.carrier_ghz, "speed_mps": walker.speed_mps}
    truth |= {"cadence_hz": 2 / walker.cycle_s, **asdict(walker)}
    truth |= {key: getattr(scene, key) for key in ("range_m", "heading_deg", "snr_db", "phase")}
    return {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in truth.items()}
