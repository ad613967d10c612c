"""Recordings of a known motion: it stands where its velocity and its time say, in whatever file it came."""

import csv
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import script
from PIL import Image
from scipy.io import savemat

from guided_diffusion_vae.config import UserError
from guided_diffusion_vae.data import microdoppler, spectrogram
from guided_diffusion_vae.data.radar_files import RecordingConfig, read_array, read_recording
from guided_diffusion_vae.data.radar_import import ImportConfig, import_recordings, prepared, window_for
from guided_diffusion_vae.data.radar_sessions import Take, blocks, find_sources, split_sessions

PRF, CARRIER = 1000.0, 24.0  # half the PRF is 3.12 m/s
RADAR = {"carrier_ghz": CARRIER, "prf_hz": PRF, "duration_s": 0.5, "image_size": 32, "colormap": "grey"}


def tone(velocity, seconds=1.0, prf=PRF, carrier=CARRIER):
    """What a scatterer at constant speed sends back; approach is positive."""
    return np.exp(2j * np.pi * spectrogram.doppler_hz(velocity, carrier) * np.arange(round(seconds * prf)) / prf)


def noise(count, seed=0, level=0.01):
    return np.random.default_rng(seed).normal(scale=level, size=(count, 2)) @ [1, 1j]


def recording(root, name, signal):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, signal)
    return path


def imported(data, out, **settings):
    """The rows of the manifest, and what was said."""
    said = []
    config = ImportConfig(data_dir=str(data), out_dir=str(out), **{**RADAR, **settings})
    import_recordings(config, said.append)
    with open(out / "manifest.csv") as handle:
        return list(csv.DictReader(handle)), "\n".join(said)


def picture(out, row):
    """The values (size, size) in [-1, 1] of a picture of the manifest."""
    values, distance = spectrogram.unit_from_colours(np.asarray(Image.open(out / row["file"])), row["colormap"])
    assert distance.max() == 0
    return values


def velocities(row, size=32):
    return spectrogram.row_axis(size, (float(row["velocity_low_mps"]), float(row["velocity_high_mps"])))


def bins_of(signal, place=3, count=8):
    """A matrix of pulses x range bins with the signal in one bin, a wall in another and noise in all."""
    matrix = noise(signal.size * count).reshape(-1, count)
    matrix[:, place] += signal
    matrix[:, 6] += 20
    return matrix


def ridge(velocity, rows=100, columns=40):
    """A spectrogram with power in the row of a velocity only: Doppler from -PRF/2 up, as fftshift leaves it."""
    power = np.full((rows, columns), 1e-4)
    power[int((spectrogram.doppler_hz(velocity, CARRIER) / PRF + 0.5) * rows)] = 1.0
    return power


def pairs(signal, scale=1.0):
    return np.stack([signal.real, signal.imag], axis=-1) * scale


FORMATS = {  # name -> writes the tone of a velocity, and the flags that its reading takes
    "complex.npy": lambda path, v: np.save(path, tone(v)),
    "pairs.npy": lambda path, v: np.save(path, pairs(tone(v), 3000).astype(np.int16).T),
    "largest.npz": lambda path, v: np.savez(path, time=np.arange(9.0), s=tone(v)),
    "signal.mat": lambda path, v: savemat(path, {"x": tone(v), "note": "words", "gain": np.ones((2, 2))}),
    "i_and_q.csv": lambda path, v: np.savetxt(path, pairs(tone(v)), delimiter=",", header="I,Q", comments=""),
    "matlab.csv": lambda path, v: path.write_text("\n".join(f"{x.real:.6f}{x.imag:+.6f}i" for x in tone(v))),
    "raw.bin": lambda path, v: pairs(tone(v), 3000).astype("<i2").tofile(path),
    "raw.iq": lambda path, v: pairs(tone(v)).astype("<f4").tofile(path),
    "matrix.npy": lambda path, v: np.save(path, bins_of(tone(v))),
    "matrix.mat": lambda path, v: savemat(path, {"data": bins_of(tone(v)).T}),
    "power.npy": lambda path, v: np.save(path, ridge(v)),
    "decibel.csv": lambda path, v: np.savetxt(path, 10 * np.log10(ridge(v)) - 60, delimiter=";"),
}
FLAGS = {"raw.bin": {"iq_format": "int16"}, "raw.iq": {"iq_format": "float32"}}
FLAGS |= {"power.npy": {"column_s": 0.02}, "decibel.csv": {"column_s": 0.02}}


@pytest.mark.parametrize("velocity", [2.0, -1.2])
@pytest.mark.parametrize("name", FORMATS)
def test_a_constant_speed_is_a_line_in_its_row(tmp_path, name, velocity):
    """In every format, approach above: the brightest row is that of the velocity, and no other is half as bright."""
    (tmp_path / "in").mkdir()
    FORMATS[name](tmp_path / "in" / name, velocity)
    (row, *_), _ = imported(tmp_path / "in", tmp_path / "out", **FLAGS.get(name, {}))
    values = picture(tmp_path / "out", row)
    axis = velocities(row)
    step = axis[0] - axis[1]
    assert np.abs(axis[values.argmax(axis=0)] - velocity).max() <= step
    away = np.abs(axis - velocity) > 3 * step
    assert values[away].max() < 0 < values.max()


def test_decibels_of_a_spectrogram_stay(tmp_path):
    """Row for row and column for column, power or dB: 40 dB below the ridge is 5 / 45 of the way up from the floor."""
    power = ridge(1.5, rows=32, columns=32)
    recording(tmp_path, "in/a_power.npy", power * 1e-9)
    recording(tmp_path, "in/b_db.npy", 10 * np.log10(power))
    rows, said = imported(tmp_path / "in", tmp_path / "out", column_s=0.5 / 32)
    for row in rows:
        values = picture(tmp_path / "out", row)
        assert np.unique(values.round(2)).tolist() == [pytest.approx(2 * 5 / 45 - 1, abs=0.01), 1.0]
        assert (values == 1).all(axis=1).sum() == 1
    assert "taken for --kind power" in said and "taken for --kind db" in said


@pytest.mark.parametrize("name", ["complex.npy", "power.npy"])
def test_a_radar_of_the_other_sign(tmp_path, name):
    (tmp_path / "in").mkdir()
    FORMATS[name](tmp_path / "in" / name, 2.0)
    (row, *_), _ = imported(tmp_path / "in", tmp_path / "out", invert_doppler=True, **FLAGS.get(name, {}))
    assert np.abs(velocities(row)[picture(tmp_path / "out", row).argmax(axis=0)] + 2.0).max() < 0.25


@pytest.fixture
def walk(monkeypatch):
    """A simulated walk: what the radar received, and its picture as the simulator colours it (without its notch)."""
    received = []

    def listen(baseband, **settings):
        received.append(baseband)
        return spectrogram.stft_power(baseband, **settings)

    monkeypatch.setattr(microdoppler, "stft_power", listen)
    monkeypatch.setattr(microdoppler, "moving_target_filter", np.ones)
    scene = microdoppler.draw_scene(0, 0, 0, 0)
    db = microdoppler.spectrogram_db(scene, np.random.default_rng(0), carrier_ghz=24.0, duration_s=1.5)
    return received[0], spectrogram.colours_from_unit(spectrogram.unit_from_db(db), "jet")


@pytest.mark.parametrize("kind", ["npy", "npz", "mat", "csv", "iq", "bin"])
def test_the_simulators_baseband_gives_its_picture(tmp_path, walk, kind):
    """Bit for bit; from 16-bit integers within a level of the colour map."""
    signal, expected = walk
    path = tmp_path / "in" / f"a_s1_1.{kind}"
    path.parent.mkdir()
    {
        "npy": lambda: np.save(path, signal * 1e-9),  # volts at an antenna are small
        "npz": lambda: np.savez(path, signal=signal),
        "mat": lambda: savemat(path, {"signal": signal}),
        "csv": lambda: np.savetxt(path, pairs(signal), fmt="%.9g", delimiter=","),
        "iq": lambda: pairs(signal).astype("<f4").tofile(path),
        "bin": lambda: np.round(pairs(signal) / np.abs(pairs(signal)).max() * 32767).astype("<i2").tofile(path),
    }[kind]()
    settings = {"prf_hz": microdoppler.prf_for(24.0), "duration_s": 1.5, "image_size": 64, "colormap": "jet"}
    settings |= {"max_velocity": 6.5, "min_velocity": -3.25, "mti": False}
    formats = {"iq": {"iq_format": "float32"}, "bin": {"iq_format": "int16"}}
    (row,), _ = imported(tmp_path / "in", tmp_path / "out", **settings, **formats.get(kind, {}))
    found = np.asarray(Image.open(tmp_path / "out" / row["file"]))
    if kind in ("npz", "mat", "csv", "iq"):
        assert np.array_equal(found, expected)
    else:  # another rounding: nearly all the same, none more than a level off
        levels = [spectrogram.unit_from_colours(image, "jet")[0] * 127.5 for image in (found, expected)]
        assert np.abs(levels[0] - levels[1]).max() < 1.5 and (found == expected).all(axis=-1).mean() > 0.9


@pytest.mark.parametrize("velocity, gain", [(0.0, 0.0), (0.12, 1 - np.exp(-0.5)), (-0.24, 1 - np.exp(-2)), (1.0, 1.0)])
def test_what_stands_still_is_taken_away(tmp_path, velocity, gain):
    """The gain 1 - exp(-v^2 / 2 s^2) with s = 0.12 m/s, which at 0 and beyond 0.5 m/s is 0 and 1."""
    config = ImportConfig(carrier_ghz=CARRIER, prf_hz=PRF)
    raw = read_recording(recording(tmp_path, "a.npy", tone(velocity, 2.0)), config)
    middle = slice(500, 1500)
    ratio = np.abs(prepared(config, raw).data[middle]).mean() / np.abs(raw.data[middle]).mean()
    assert ratio == pytest.approx(gain, abs=2e-3)


def test_a_wall_outshines_a_walker_unless_it_is_taken_away(tmp_path):
    recording(tmp_path, "in/a_1.npy", 300 * tone(0.0) + tone(1.5) + noise(1000))
    for mti, expected in ((True, 1.5), (False, 0.0)):
        (row, *_), _ = imported(tmp_path / "in", tmp_path / str(mti), mti=mti)
        assert np.abs(velocities(row)[picture(tmp_path / str(mti), row).argmax(axis=0)] - expected).max() < 0.2


def test_range_bins(tmp_path):
    """Those with most motion, a wall or not, or those that are named."""
    path = recording(tmp_path, "a.npy", bins_of(tone(1.0), place=2) + bins_of(tone(-2.0), place=4) * 0.5)
    settings = {"carrier_ghz": CARRIER, "prf_hz": PRF}
    found = read_recording(path, RecordingConfig(**settings))
    assert "--range_bins 2:3 of 8 hold most motion" in "; ".join(found.notes)
    for bins, velocity in (("", 1.0), ("2:3", 1.0), ("4:6", -2.0)):
        data = read_recording(path, RecordingConfig(range_bins=bins, **settings)).data
        turn = np.angle((data[1:] * data[:-1].conj()).mean()) / (2 * np.pi) * PRF
        assert turn == pytest.approx(spectrogram.doppler_hz(velocity, CARRIER), abs=2), bins
    with pytest.raises(UserError, match="a.npy has 8 range bins: --range_bins 7:9 goes beyond"):
        read_recording(path, RecordingConfig(range_bins="7:9", **settings))


def test_times_of_the_manifest(tmp_path):
    """Somebody starts to move 2.0 s after the first pulse: there, by start and columns, the pictures grow bright."""
    signal = noise(4000, level=1e-4)
    signal[2000:] += tone(1.5, 2.0)
    recording(tmp_path, "in/a_1.npy", signal)
    rows, _ = imported(tmp_path / "in", tmp_path / "out", duration_s=1.0, window_s=0.05, test_sessions="", mti=False)
    starts = [float(row["start_s"]) for row in rows]
    assert starts[:2] == [0.05, 1.05]  # the first column is the spectrum of the first whole window
    crossed = 0
    for row in rows:
        bright = (picture(tmp_path / "out", row).max(axis=0) > 0) & (picture(tmp_path / "out", row).argmax(axis=0) < 16)
        times = float(row["start_s"]) + (np.arange(32) + 0.5) / 32 * float(row["duration_s"])
        if times[0] < 2 < times[-1]:
            level = picture(tmp_path / "out", row)[np.abs(velocities(row) - 1.5).argmin()]
            assert times[np.argmax(level > 0)] == pytest.approx(2.0, abs=0.05)
            crossed += 1
        else:
            assert bright.all() == (times[0] > 2)
    assert crossed == 1


def test_the_hop(tmp_path):
    """3 s, pictures of 0.5 s and twice 0.1 s of window: starts at 0.1, 0.35, ... as long as 0.6 s are left."""
    recording(tmp_path, "in/a_1.npy", tone(1.0, 3.0))
    rows, _ = imported(tmp_path / "in", tmp_path / "out", hop_s=0.25, window_s=0.1)
    starts = sorted(float(row["start_s"]) for row in rows)
    assert starts[0] == 0.1 and starts[-1] == pytest.approx(2.35)  # 2.35 + 0.5 + 0.1 <= 3.0 < 2.6 + 0.6
    assert set(np.round(np.mod(np.array(starts) - 0.1, 0.25), 6)) <= {0.0, 0.25}


def test_a_stretch_in_which_the_radar_was_off_gives_no_picture(tmp_path):
    signal = tone(1.0, 4.0)
    signal[1500:3000] = 0
    for session in (1, 2):
        recording(tmp_path, f"in/a_s{session}_1.npy", signal)
    rows, said = imported(tmp_path / "in", tmp_path / "out", window_s=0.1)
    starts = sorted(round(float(row["start_s"]), 1) for row in rows if row["session"] == "s1")
    assert starts == [0.1, 0.6, 1.1, 3.1]  # of 0.7 s from 0.1 s before: those at 1.6, 2.1 and 2.6 hear 0, 0 and 0.2 s
    assert "2 of 2 recordings: pictures that were silent for half of their time are left out" in said


# ---- who and when ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, expected",
    [
        (["user_00/day1/a.npy", "user_01/day2/b.npy"], [("user_00", "day1", "day1_a"), ("user_01", "day2", "day2_b")]),
        (["user_00/user_00_s02_0001.npy", "u/x.npy"], [("u", "", "x"), ("user_00", "s02", "user_00_s02_0001")]),
        (["anna_monday_003.csv", "bob_7.mat"], [("anna", "monday", "anna_monday_003"), ("bob", "", "bob_7")]),
        (["a/day1.npy", "b/s3_fast_1.iq"], [("a", "day1", "day1"), ("b", "s3", "s3_fast_1")]),
    ],
)
def test_users_and_sessions_by_folder_or_name(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    sources = find_sources(str(tmp_path), (".npy", ".csv", ".mat", ".iq"))
    assert [(source.user, source.session, source.name) for source in sources] == expected


def test_two_recordings_of_one_name_are_refused(tmp_path):
    for suffix in (".npy", ".mat"):
        (tmp_path / f"a_1{suffix}").touch()
    with pytest.raises(UserError, match="two recordings of a are called a_1"):
        find_sources(str(tmp_path), (".npy", ".mat"))


def test_the_last_sessions_are_held_out():
    keys = [("a", f"s{i}") for i in (1, 2, 9, 10)] + [("b", "x"), ("b", "y"), ("c", "")]
    split = split_sessions(keys)
    assert [split["a", name] for name in ("s1", "s2", "s9", "s10")] == ["train", "train", "val", "test"]
    assert [split["b", name] for name in "xy"] == ["train", "test"] and split["c", ""] == ""
    named = split_sessions(keys[:4], val=["s1"], test=["s2"])
    assert list(named.values()) == ["val", "test", "train", "train"]


@pytest.mark.parametrize(
    "val, test, words",
    [
        (["s3"], [], "--val_sessions s3 is not there; there are s1, s2"),
        (["s1"], ["s1"], "--val_sessions s1 is for both"),
        (["s1"], ["s2"], "leave a nothing to train on"),
    ],
)
def test_sessions_that_cannot_be_held_out(val, test, words):
    with pytest.raises(UserError, match=words):
        split_sessions([("a", "s1"), ("a", "s2")], val, test)


def test_sessions_are_apart(tmp_path):
    for user in "ab":
        for day in (1, 2, 10):
            recording(tmp_path, f"in/{user}/day{day}/walk.npy", tone(1.0 + day / 10) + noise(1000))
    rows, said = imported(tmp_path / "in", tmp_path / "out")
    where = {(row["user"], row["session"], row["split"]) for row in rows}
    assert where == {(u, d, s) for u in "ab" for d, s in (("day1", "train"), ("day2", "val"), ("day10", "test"))}
    for row in rows:  # the picture is of that day
        brightest = velocities(row)[picture(tmp_path / "out", row).mean(axis=1).argmax()]
        assert brightest == pytest.approx(1.0 + int(row["session"][3:]) / 10, abs=0.11)
        assert row["file"].startswith(f"{row['split']}/{row['user']}/{row['session']}_walk_")
    assert "sessions for test: day10" in said and "upper bound" not in said


def test_what_is_held_out_of_a_single_session_is_in_no_training_picture(tmp_path):
    """Other pulses from the first one of a validation picture on, and the training pictures keep their bytes."""
    signal = tone(1.2, 14.0) + noise(14_000, level=0.3)
    recording(tmp_path, "in/a_1.npy", signal)
    rows, said = imported(tmp_path / "in", tmp_path / "out", hop_s=0.3, window_s=0.1, mti=False)
    first = {split: min(float(row["start_s"]) for row in rows if row["split"] == split) for split in ("val", "test")}
    assert first["val"] < first["test"] and "1 users have one session (a)" in said and "upper bound" in said
    for split, earlier in (("val", {"train"}), ("test", {"train", "val"})):
        other = signal.copy()
        other[round((first[split] - 0.1) * PRF) :] = noise(14_000)[: -round((first[split] - 0.1) * PRF)]
        recording(tmp_path, f"{split}/a_1.npy", other)
        again, _ = imported(tmp_path / split, tmp_path / f"out_{split}", hop_s=0.3, window_s=0.1, mti=False)
        for row in rows:
            same = [(tmp_path / out / row["file"]).read_bytes() for out in ("out", f"out_{split}")]
            assert (same[0] == same[1]) == (row["split"] in earlier), row["file"]
        assert len(again) == len(rows)


def test_blocks_of_many_short_recordings_need_no_gap():
    takes = [Take(source, (0.1,), 0.7) for source in range(20)]
    splits = blocks([(take, 0.1) for take in takes])
    assert splits == ["train"] * 14 + ["val"] * 3 + ["test"] * 3
    assert blocks([(takes[0], 0.1), (takes[0], 0.6)]) == ["train"] * 2  # too few to hold any out


# ---- the radar -------------------------------------------------------------------------------------------------------


def test_parameters_are_read_from_the_file_and_said(tmp_path):
    radar = {"PRF": PRF, "fc": CARRIER * 1e9}
    (tmp_path / "in").mkdir()
    savemat(tmp_path / "in" / "a_1.mat", {"x": tone(2.0), **radar})
    np.savez(tmp_path / "in" / "b_1.npz", x=tone(2.0), pri=1 / PRF, carrier_ghz=CARRIER)
    rows, said = imported(tmp_path / "in", tmp_path / "out", carrier_ghz=0.0, prf_hz=0.0)
    assert {(row["prf_hz"], row["carrier_ghz"]) for row in rows} == {("1000", "24")}
    for words in ("--prf_hz is 1000, from prf in the file", "from pri in", "--carrier_ghz is 24, from fc in the file"):
        assert words in said
    for row in rows:
        assert velocities(row)[picture(tmp_path / "out", row).mean(axis=1).argmax()] == pytest.approx(2.0, abs=0.11)
    flag = read_recording(tmp_path / "in" / "a_1.mat", RecordingConfig(prf_hz=500.0))
    assert (flag.prf_hz, flag.carrier_ghz) == (500.0, CARRIER)  # a flag outweighs the file


@pytest.mark.parametrize("missing", ["prf_hz", "carrier_ghz", "column_s"])
def test_a_parameter_that_nobody_gave_is_asked_for(tmp_path, missing):
    path = recording(tmp_path, "a.npy", ridge(1.0))
    settings = {"carrier_ghz": 24.0, "prf_hz": PRF, "column_s": 0.1, missing: 0.0}
    with pytest.raises(UserError, match=f"a.npy does not say its .*: give --{missing}$"):
        read_recording(path, RecordingConfig(**settings))


def test_the_axis_is_what_the_prf_allows(tmp_path):
    """A third of it may be given away to approach, but no more than a PRF shown."""
    limit = spectrogram.velocity_mps(PRF / 2, CARRIER)
    recording(tmp_path, "in/a_1.npy", tone(4.0))  # beyond half the PRF: an alias, unless the axis begins later
    rows, said = imported(tmp_path / "in", tmp_path / "whole")
    assert float(rows[0]["velocity_high_mps"]) == pytest.approx(limit, rel=1e-5) and f"{limit:.4g} m/s" in said
    within = float(said.split("of the energy lie within ")[1].split()[0])
    assert within == pytest.approx(2 * limit - 4.0, abs=0.1)
    assert velocities(rows[0])[picture(tmp_path / "whole", rows[0]).mean(axis=1).argmax()] < -2
    rows, _ = imported(tmp_path / "in", tmp_path / "up", max_velocity=4.5, min_velocity=-1.5)
    found = velocities(rows[0])[picture(tmp_path / "up", rows[0]).mean(axis=1).argmax()]
    assert found == pytest.approx(4.0, abs=0.1)
    with pytest.raises(UserError, match=r"--max_velocity is 4.5, but the PRF of .*a_1.npy allows -3.123 to 3.123 m/s"):
        imported(tmp_path / "in", tmp_path / "no", max_velocity=4.5)


def test_what_holds_nearly_all_of_the_energy_is_said(tmp_path):
    """A torso at 1 m/s, legs of a hundredth of its power at 2.4 m/s, and noise, which does not count."""
    for user in "ab":
        recording(tmp_path, f"in/{user}/1.npy", tone(1.0, 9.0) + 0.1 * tone(-2.4, 9.0) + noise(9000, level=0.07))
    _, said = imported(tmp_path / "in", tmp_path / "out")
    assert float(said.split("99.9% of the energy lie within ")[1].split()[0]) == pytest.approx(2.4, abs=0.1)


def test_the_window_follows_the_carrier():
    assert [window_for(ghz) for ghz in (77.0, 24.0, 5.8)] == [0.10, 0.14, 0.20]
    assert 0.10 < window_for(60.0) < 0.11 and window_for(94.0) == 0.10 and window_for(2.4) == 0.20


@pytest.mark.parametrize(
    "field, value",
    [("carrier_ghz", -1.0), ("prf_hz", float("nan")), ("kind", "cube"), ("iq_format", "int8"), ("range_bins", "5:5")]
    + [("extension", ".wav"), ("hop_s", 1e-9), ("duration_s", 0.0), ("image_size", 4), ("min_velocity", 1.0)]
    + [("floor_db", 3.0), ("colormap", "hot"), ("window_s", float("inf")), ("max_velocity", -2.0)],
)
def test_bad_settings_name_the_flag(field, value):
    with pytest.raises((UserError, ValueError), match=f"--{field} "):
        ImportConfig(**{field: value})


# ---- files that cannot be used ---------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return (Path("trap").touch, ())


SHAPE = f"{{'descr': '<c16', 'fortran_order': False, 'shape': ({10**15},), }}".ljust(117)
VAST = b"\x93NUMPY\x01\x00v\x00" + SHAPE.encode() + b"\n"  # says that it holds 16 petabytes
BAD = {  # file, what is written, what is said of it
    "objects.npy": (lambda path: np.save(path, np.array([Trap()], dtype=object)), "cannot be read .*as numbers only"),
    "pickle.npy": (lambda path: path.write_bytes(__import__("pickle").dumps(Trap())), "cannot be read"),
    "objects.npz": (lambda path: np.savez(path, a=np.array([Trap()], dtype=object)), "holds no numeric array"),
    "struct.mat": (lambda path: savemat(path, {"radar": {"x": tone(1.0)}}), "holds no numeric array"),
    "cell.mat": (lambda path: savemat(path, {"c": np.array([1, "b"], dtype=object)}), "holds no numeric array"),
    "nan.npy": (lambda path: np.save(path, np.r_[tone(1.0), np.nan]), "holds 1 of 1001 values that are no numbers"),
    "short.npy": (lambda path: np.save(path, tone(1.0, 0.3)), "is 0.30 s long, a picture needs 0.78 s: .*--duration_s"),
    "empty.npy": (lambda path: np.save(path, np.zeros(0)), "is empty"),
    "zeros.csv": (lambda path: np.savetxt(path, np.zeros((1000, 2))), "is zero throughout"),
    "still.npy": (lambda path: np.save(path, np.full(1000, 3 + 1j)), "holds nothing that moves: .*--mti False"),
    "cube.npy": (lambda path: np.save(path, np.ones((4, 30, 20), complex)), "has the shape .4, 30, 20.: give pulses"),
    "columns.csv": (lambda path: np.savetxt(path, np.random.rand(900, 3)), "has 900 x 3 real values: keep one column"),
    "words.csv": (lambda path: path.write_text("time,who\nmonday,anna\n"), "cannot be read"),
    "nothing.csv": (lambda path: path.write_text(""), "is empty"),
    "half.npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "cannot be read"),
    "vast.npy": (lambda path: path.write_bytes(VAST), "cannot be read"),
    "half.mat": (lambda path: path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200)), "cannot be read|no numeric"),
    "odd.bin": (lambda path: path.write_bytes(bytes(4001)), "does not hold pairs of int16: give another --iq_format"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, monkeypatch, name):
    """Nothing in it is run; the others can go on without it, and that is said."""
    monkeypatch.chdir(tmp_path)
    write, words = BAD[name]
    recording(tmp_path, "in/a/s1.npy", tone(1.0))
    (tmp_path / "in" / "b").mkdir()
    write(tmp_path / "in" / "b" / name)
    settings = {"iq_format": "int16"}
    with pytest.raises(UserError, match=rf"1 of 2 recordings cannot be used: \S*{name} .*") as error:
        imported(tmp_path / "in", tmp_path / "out", **settings)
    assert error.match(words) and error.match("give --skip_bad_files True") and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    rows, said = imported(tmp_path / "in", tmp_path / "out", skip_bad_files=True, **settings)
    assert {row["user"] for row in rows} == {"a"} and f"left out 1 of 2 recordings: {tmp_path}/in/b/{name}" in said
    assert not (tmp_path / "trap").exists()


def test_an_array_that_is_not_there(tmp_path):
    savemat(tmp_path / "a.mat", {"x": tone(1.0), "y": tone(2.0, 0.5)})
    assert len(read_array(tmp_path / "a.mat", variable="y")[0].ravel()) == 500
    assert read_array(tmp_path / "a.mat")[2] == ("the largest of 2 arrays is --variable x",)
    with pytest.raises(UserError, match="a.mat has no numeric array --variable z; it has x, y"):
        read_array(tmp_path / "a.mat", variable="z")


def test_a_kind_that_the_array_is_not(tmp_path):
    flat, wide = recording(tmp_path, "a.npy", tone(1.0)), recording(tmp_path, "b.npy", bins_of(tone(1.0)))
    for path, kind, words in ((flat, "matrix", "one-dim"), (wide, "iq", "two-dim"), (wide, "db", "is complex")):
        with pytest.raises(UserError, match=words):
            read_recording(path, RecordingConfig(kind=kind, carrier_ghz=24.0, prf_hz=PRF, column_s=0.1))
    negative = recording(tmp_path, "c.npy", -ridge(1.0))
    with pytest.raises(UserError, match="has negative values, which no power has: --kind db"):
        read_recording(negative, RecordingConfig(kind="power", carrier_ghz=24.0, prf_hz=PRF, column_s=0.1))


def test_raw_files_need_their_format(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(4000))
    with pytest.raises(UserError, match="a.bin is raw: give --iq_format int16 or float32"):
        read_array(tmp_path / "a.bin")


def test_matlab_7_3_says_what_to_do_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.mat").write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(600))
    with pytest.raises(UserError, match=r"a.mat is MATLAB 7.3: save it with -v7 .*or pip install h5py"):
        read_array(tmp_path / "a.mat")


class DataSet:
    """As much of h5py.Dataset as is used."""

    def __init__(self, array, external=()):
        self.array, self.external = array, external
        self.shape, self.size, self.dtype = array.shape, array.size, array.dtype

    def __getitem__(self, place):
        return self.array[place]


def test_matlab_7_3_is_transposed_and_complex_as_pairs(tmp_path, monkeypatch):
    """By a stand-in for h5py: what MATLAB calls 5 x 40 is stored as 40 x 5, and links to other files stay shut."""
    values = np.arange(200.0).reshape(5, 40) * (1 + 2j)
    stored = np.zeros((40, 5), dtype=[("real", float), ("imag", float)])
    stored["real"], stored["imag"] = values.real.T, values.imag.T

    class File(dict):
        def __init__(self, path, mode):
            secret = DataSet(np.zeros((900, 900)))
            large, prf = DataSet(np.zeros((800, 800)), external=("/else",)), DataSet(np.array([[PRF]]))
            super().__init__(x=DataSet(stored), PRF=prf, large=large, secret=secret, words=object())

        def get(self, name, getlink):
            return HardLink() if name != "secret" else None

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    class HardLink:
        pass

    stand_in = types.SimpleNamespace(File=File, Dataset=DataSet, HardLink=HardLink)
    monkeypatch.setitem(sys.modules, "h5py", stand_in)
    (tmp_path / "a.mat").write_bytes(b"MATLAB 7.3 MAT-file")
    array, scalars, _ = read_array(tmp_path / "a.mat")
    assert np.array_equal(array, values) and scalars == {"prf": PRF}


def test_matlab_7_3_by_h5py(tmp_path):
    h5py = pytest.importorskip("h5py")
    stored = np.zeros((40, 5), dtype=[("real", float), ("imag", float)])
    stored["imag"] = np.arange(200.0).reshape(40, 5)
    with h5py.File(tmp_path / "a.mat", "w") as file:
        file["x"], file["PRF"] = stored, np.array([[PRF]])
        file["elsewhere"] = h5py.ExternalLink("b.mat", "x")
    array, scalars, _ = read_array(tmp_path / "a.mat")
    assert np.array_equal(array, 1j * np.arange(200.0).reshape(40, 5).T) and scalars == {"prf": PRF}


# ---- the folder ------------------------------------------------------------------------------------------------------


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_gives_the_same_bytes_and_another_is_refused(tmp_path):
    for user, day in (("a", 1), ("a", 2), ("b", 1)):
        recording(tmp_path, f"in/{user}/day{day}.npy", tone(1.0) + noise(1000, day))
    for out in ("one", "two", "one"):
        imported(tmp_path / "in", tmp_path / out)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(UserError, match="--floor_db is -30.0, but --out_dir .* made with -45.0"):
        imported(tmp_path / "in", tmp_path / "one", floor_db=-30.0)
    recording(tmp_path, "in/a/day3.npy", tone(1.0))  # day 2 would be validation now, and its test pictures were left
    with pytest.raises(UserError, match="--out_dir .* holds test/.* of other recordings"):
        imported(tmp_path / "in", tmp_path / "one")
    with pytest.raises(UserError, match="--out_dir .* lies in --data_dir"):
        imported(tmp_path / "in", tmp_path / "in" / "out")


def test_the_script_from_recordings_to_pictures_with_axes(tmp_path):
    for user in "ab":
        recording(tmp_path, f"in/{user}/day1.npy", tone(1.5) + noise(1000))
    flags = ["--data_dir", tmp_path / "in", "--out_dir", tmp_path / "out", "--prf_hz", 1000, "--duration_s", 0.5]
    failed = script("import_radar.py", *flags, check=False)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.strip().splitlines()[-1].endswith("day1.npy does not say its carrier: give --carrier_ghz")
    done = script("import_radar.py", *flags, "--carrier_ghz", 24, "--plot", True)
    assert "2 pictures of 2 users" in done.stdout
    axes = yaml.safe_load((tmp_path / "out" / "axes.yaml").read_text())
    limit = spectrogram.velocity_mps(500.0, 24.0)
    assert axes["velocity_mps"] == [pytest.approx(-limit), pytest.approx(limit)]
    assert axes["mps_per_row"] == pytest.approx(2 * limit / 64) and axes["s_per_column"] == pytest.approx(0.5 / 64)
    assert (axes["prf_hz"], axes["carrier_ghz"], axes["window_s"], axes["db"]) == (1000, 24, 0.14, [-45, 0])
    sheet = np.asarray(Image.open(tmp_path / "out" / "overview.png"))
    first = np.asarray(Image.open(tmp_path / "out" / "train" / "b" / "day1_0000.png"))
    places = np.argwhere((sheet[:, :, None, :] == first[None, :1, :1]).all(axis=-1)[..., 0])
    assert any(np.array_equal(sheet[y : y + 192 : 3, x : x + 192 : 3], first) for y, x in places if y > 200)
