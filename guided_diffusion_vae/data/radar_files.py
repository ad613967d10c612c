"""Recordings of a radar: what is in a file, whoever wrote it.

    iq      baseband s(t), complex (T,), one value a pulse; approach turns it forward, s ~ exp(+2 pi j f t)
    matrix  complex (T, R): pulses (slow time) down, range bins (after the range transform) across; bins are summed
    power   a spectrogram, real (F, T): Doppler from -PRF/2 up to +PRF/2 in rows, as fftshift leaves it, time in columns
    db      the same in decibels

Files are data and never code: no pickles, no objects, nothing larger than MAX_BYTES when unpacked.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import UserError

EXTENSIONS = (".mat", ".npy", ".npz", ".csv", ".bin", ".dat", ".iq")
IQ_FORMATS = {"int16": "<i2", "float32": "<f4"}
KINDS = ("iq", "matrix", "power", "db")
MAX_BYTES = 4 << 30
NUMERIC = {"double", "single", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}  # MATLAB's
NARROW = 8  # a picture has more rows and columns than this; less is a table whose columns nobody explained
MOTION = 0.05  # range bins beside the one with most motion are summed down to this part of its energy
SCALARS = {  # what common names of a file's scalars mean, and the power that makes it ours (an interval: -1)
    "prf_hz": {"prf_hz": 1, "prf": 1, "pulse_repetition_frequency": 1, "pri": -1, "pri_s": -1, "prt": -1, "prt_s": -1},
    "carrier_ghz": dict.fromkeys(
        ("carrier_ghz", "fc_ghz", "carrier_hz", "carrier", "carrier_frequency", "center_frequency", "fc", "fc_hz"), 1
    ),
    "column_s": {"column_s": 1, "frame_s": 1, "column_hz": -1, "frame_hz": -1},
}
MEANING = {"prf_hz": "pulses a second", "carrier_ghz": "carrier", "column_s": "seconds from column to column"}


class BadFile(UserError):
    """A recording that cannot be used: which, why, and what to do. Others may be fine."""


@dataclass(frozen=True, kw_only=True)
class RecordingConfig:
    """How recordings are read."""

    data_dir: str = ""  # recordings: a folder a user (and in it a folder a session), or files user_session_rest
    extension: str = ""  # read only files that end so, such as .mat; empty: all that are known
    variable: str = ""  # which array of a .mat or .npz; empty: the largest
    iq_format: str = ""  # of .bin, .dat and .iq, which hold I and Q in turn: int16 or float32
    kind: str = ""  # iq, matrix (pulses x range bins), power or db (Doppler x time); empty: guessed, and said
    range_bins: str = ""  # a:b, the bins of a matrix that are summed; empty: those with most motion, and said
    carrier_ghz: float = 0.0  # of the radar: 77, 24, 5.8 or any other; 0: read from the file
    prf_hz: float = 0.0  # pulses a second; of a spectrogram: what its rows span; 0: read from the file
    column_s: float = 0.0  # of a spectrogram: seconds from column to column; 0: read from the file
    invert_doppler: bool = False  # for a radar, or a file, in which approach is negative

    def __post_init__(self):
        for name, choice in {"extension": EXTENSIONS, "iq_format": IQ_FORMATS, "kind": KINDS}.items():
            if getattr(self, name) not in ("", *choice):
                raise UserError(f"--{name} is {getattr(self, name)}; it must be one of {', '.join(choice)}")
        for name in MEANING:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be above 0, or 0 to read it from the file")
        first, last = _span(self.range_bins)
        if self.range_bins and not 0 <= first < last:
            raise UserError(f"--range_bins is {self.range_bins}; it must be a:b with 0 <= a < b, such as 12:20")


class Recording(NamedTuple):
    """What a file holds, in one of two forms.

    Of baseband: complex64 (T,), range bins summed. Of a spectrogram: power, float64 (F, T), fastest approach first.
    Both are scaled to a largest value in [0.5, 1) by a power of two, so that no format's unit underflows.
    """

    data: np.ndarray
    kind: str
    prf_hz: float
    carrier_ghz: float
    rate_hz: float  # of its time axis: pulses, or columns, a second
    notes: tuple[str, ...]  # what was guessed or taken from the file, each with the flag that says otherwise


def read_recording(path: Path, config: RecordingConfig) -> Recording:
    """Read one file.

    Raises:
        BadFile: it is damaged, holds no such array, objects, values that are no numbers, or nothing but zeros.
        UserError: a flag is missing that no file can do without.
    """
    array, scalars, notes = read_array(path, variable=config.variable, iq_format=config.iq_format)
    array = np.squeeze(array)
    if array.size and not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise BadFile(f"{path} holds {count} of {array.size} values that are no numbers: cut them out, or interpolate")
    if not array.any():
        raise BadFile(f"{path} is {'zero throughout' if array.size else 'empty'}: remove it, or record it again")
    array, kind, guessed = _kind_of(array, config.kind, path)
    notes += guessed
    if kind == "db":
        array = 10.0 ** ((array - array.max()) / 10)
    elif kind == "power" and array.min() < 0:
        raise BadFile(f"{path} has negative values, which no power has: --kind db, or mend it")
    data = array * 2.0 ** -np.frexp(np.abs(array).max())[1]
    if kind == "matrix":
        data, chosen = _sum_of_bins(data, config.range_bins, path)
        notes += chosen
    elif config.range_bins:
        notes += (f"--range_bins is ignored: {kind} has no range",)
    facts = {}
    for name in ("prf_hz", "carrier_ghz", *(("column_s",) if kind in ("power", "db") else ())):
        facts[name], told = _fact(name, config, scalars, path)
        notes += told
    if kind in ("power", "db"):
        data = data.astype(np.float64)[:: 1 if config.invert_doppler else -1]
        return Recording(data, "power", facts["prf_hz"], facts["carrier_ghz"], 1 / facts["column_s"], notes)
    if not np.iscomplexobj(data):
        notes += ("real baseband (I without Q): approach and recession look alike",)
    data = (data.conj() if config.invert_doppler else data).astype(np.complex64)
    return Recording(data, "iq", facts["prf_hz"], facts["carrier_ghz"], facts["prf_hz"], notes)


def _fact(name: str, config, scalars: dict[str, float], path) -> tuple[float, tuple[str, ...]]:
    """A parameter of the radar: what the flag says, else what the file does."""
    for key, power in SCALARS[name].items():
        if not getattr(config, name) and scalars.get(key, 0) > 0:
            value = scalars[key] ** power
            value /= 1e9 if name == "carrier_ghz" and value > 1e6 else 1  # GHz or Hz: no radar leaves a doubt
            return value, (f"--{name} is {value:g}, from {key} in the file",)
    if getattr(config, name):
        return getattr(config, name), ()
    raise UserError(f"{path} does not say its {MEANING[name]}: give --{name}")


def _kind_of(array, kind: str, path) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """The array in its kind's shape, its kind, and what was guessed. I and Q in two columns become complex."""
    if array.ndim > 2:
        raise BadFile(f"{path} has the shape {array.shape}: give pulses, or pulses x range bins, of one antenna")
    real = not np.iscomplexobj(array)
    if real and array.ndim == 2 and 2 in array.shape and kind in ("", "iq"):
        pairs = array if array.shape[1] == 2 else array.T
        return pairs[:, 0] + 1j * pairs[:, 1].astype(np.float64), "iq", ()
    flat = array.ndim < 2
    if not kind and not flat and min(array.shape) < NARROW and real:
        raise BadFile(f"{path} has {array.shape[0]} x {array.shape[1]} real values: keep one column, or I and Q as two")
    guess = "iq" if flat else "matrix" if not real else "db" if array.min() < 0 else "power"
    if kind and flat != (kind == "iq"):
        raise BadFile(f"{path} is {'one' if flat else 'two'}-dimensional {array.shape}, which --kind {kind} is not")
    if kind in ("power", "db") and not real:
        raise BadFile(f"{path} is complex, which --kind {kind} is not: give its squared magnitude")
    notes = () if kind or flat else (f"two-dimensional and {'real' if real else 'complex'}: taken for --kind {guess}",)
    if (kind or guess) == "matrix" and array.shape[0] < array.shape[1]:
        return array.T, "matrix", (*notes, "more columns than rows: pulses are taken to run across")
    return np.atleast_1d(array.astype(np.result_type(array, np.float32))), kind or guess, notes


def _sum_of_bins(matrix, range_bins: str, path) -> tuple[np.ndarray, tuple[str, ...]]:
    """The baseband (T,) of a matrix (T, R): the sum over the given bins, or over those around most motion."""
    first, last = _span(range_bins)
    if range_bins and last > matrix.shape[1]:
        raise BadFile(f"{path} has {matrix.shape[1]} range bins: --range_bins {range_bins} goes beyond")
    if range_bins:
        return matrix[:, first:last].sum(axis=1), ()
    energy = matrix.var(axis=0)  # of what is not constant
    peak, enough = int(energy.argmax()), energy >= MOTION * energy.max()
    first = peak - int(np.argmin([*enough[:peak][::-1], False]))
    last = peak + 1 + int(np.argmin([*enough[peak + 1 :], False]))
    return matrix[:, first:last].sum(axis=1), (f"--range_bins {first}:{last} of {matrix.shape[1]} hold most motion",)


def _span(words: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", words)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def read_array(path: Path, *, variable="", iq_format="") -> tuple[np.ndarray, dict[str, float], tuple[str, ...]]:
    """The array of a file, the numbers that stand beside it (by name in lower case), and which array was taken.

    Raises:
        BadFile: it cannot be read, or has no such array; UserError: --iq_format is missing.
    """
    if path.suffix.lower() in (".bin", ".dat", ".iq") and not iq_format:
        raise UserError(f"{path} is raw: give --iq_format {' or '.join(IQ_FORMATS)}")
    try:
        if not path.is_file():  # to open a pipe would wait for ever
            raise BadFile(f"{path} is no file")
        _refuse_large(path, path.stat().st_size)
        if path.suffix.lower() == ".csv":
            return _read_csv(path), {}, ()
        if path.suffix.lower() not in (".mat", ".npy", ".npz"):
            values = np.fromfile(path, IQ_FORMATS[iq_format])
            if path.stat().st_size % (2 * values.itemsize):
                raise BadFile(f"{path} does not hold pairs of {iq_format}: give another --iq_format")
            return values.reshape(-1, 2), {}, ()
        return (_read_mat if path.suffix.lower() == ".mat" else _read_numpy)(path, variable)
    except UserError:
        raise
    except Exception as error:  # the readers raise everything from KeyError to MemoryError for damaged files
        why = " ".join(str(error).split())[:150] or type(error).__name__
        raise BadFile(f"{path} cannot be read ({why}): write it again, as numbers only") from error


def _refuse_large(path, size: int) -> None:
    if size > MAX_BYTES:
        raise BadFile(f"{path} unpacks to {size / 2**30:.1f} GiB: cut it into recordings below {MAX_BYTES >> 30} GiB")


def _read_csv(path) -> np.ndarray:
    """Columns of real or complex numbers, split by commas, semicolons or blanks; a first line of words is passed over.

    MATLAB writes the imaginary unit as i, Python as j.
    """
    lines = [re.sub(r"[;,\s]+", " ", line).strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    lines = [line.replace("i", "j").replace("jnf", "inf") for line in lines if line]
    try:
        [complex(word) for word in lines[0].split()]
    except (IndexError, ValueError):
        lines = lines[1:]
    if not lines:
        return np.zeros(0)
    return np.loadtxt(lines, dtype=complex if any("j" in line for line in lines) else float, ndmin=2)


def _read_numpy(path, variable: str):
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        if loaded.dtype.kind not in "iufc":
            raise BadFile(f"{path} holds {loaded.dtype}, no numbers: save a numeric array")
        return np.array(loaded), {}, ()
    with loaded:
        _refuse_large(path, sum(info.file_size for info in loaded.zip.infolist()))
        arrays = {}
        for name in loaded.files:
            try:
                arrays[name] = np.asanyarray(loaded[name])
            except ValueError:  # objects: of no interest, unless asked for
                continue
    arrays = {name: array for name, array in arrays.items() if array.dtype.kind in "iufc"}
    name, note = _choose({name: array.shape for name, array in arrays.items()}, variable, path)
    return arrays[name], _scalars(arrays), note


def _read_mat(path, variable: str):
    from scipy.io import loadmat, whosmat

    with open(path, "rb") as handle:
        head = handle.read(16)
    if head.startswith((b"MATLAB 7.3", b"\x89HDF")):
        return _read_hdf5(path, variable)
    shapes = {name: shape for name, shape, kind in whosmat(path, appendmat=False) if kind in NUMERIC}
    name, note = _choose(shapes, variable, path)
    _refuse_large(path, math.prod(shapes[name]) * 16)
    wanted = [name, *(other for other, shape in shapes.items() if math.prod(shape) == 1)]
    arrays = loadmat(path, appendmat=False, variable_names=wanted)
    return arrays[name], _scalars({key: arrays[key] for key in wanted}), note


def _read_hdf5(path, variable: str):
    """MATLAB 7.3: arrays are transposed, complex ones are pairs (real, imag)."""
    try:
        import h5py  # type: ignore[import-not-found]
    except ImportError:
        raise BadFile(f"{path} is MATLAB 7.3: save it with -v7 (`save x.mat data -v7`), or pip install h5py") from None
    with h5py.File(path, "r") as file:
        own = [name for name in file if isinstance(file.get(name, getlink=True), h5py.HardLink)]  # no other files
        sets = {name: file[name] for name in own if isinstance(file[name], h5py.Dataset) and not file[name].external}
        sets = {name: item for name, item in sets.items() if item.dtype.kind in "iuf" or item.dtype.names}
        name, note = _choose({name: item.shape for name, item in sets.items()}, variable, path)
        _refuse_large(path, math.prod(sets[name].shape) * 16)
        wanted = {name: item for name, item in sets.items() if item.size == 1} | {name: sets[name]}
        arrays = {key: np.asarray(item[()]).T for key, item in wanted.items()}
    arrays = {key: item["real"] + 1j * item["imag"] if item.dtype.names else item for key, item in arrays.items()}
    return arrays[name], _scalars(arrays), note


def _choose(shapes: dict[str, tuple], variable: str, path) -> tuple[str, tuple[str, ...]]:
    """The array that --variable names, or the largest, with a note if there was a choice."""
    if variable:
        if variable not in shapes:
            raise BadFile(f"{path} has no numeric array --variable {variable}; it has {', '.join(shapes) or 'none'}")
        return variable, ()
    if not shapes:
        raise BadFile(f"{path} holds no numeric array (structs, cells and objects are not read): save a plain one")
    name = max(shapes, key=lambda key: math.prod(shapes[key]))
    large = [key for key, shape in shapes.items() if math.prod(shape) > 1]
    return name, (f"the largest of {len(large)} arrays is --variable {name}",) if len(large) > 1 else ()


def _scalars(arrays) -> dict[str, float]:
    """The real numbers among arrays, by their names in lower case."""
    single = {name.lower(): item for name, item in arrays.items() if np.size(item) == 1 and np.isrealobj(item)}
    return {name: float(np.ravel(item)[0]) for name, item in single.items() if np.isfinite(item).all()}
