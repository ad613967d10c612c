"""One script, four launchers: mpiexec, torchrun, srun, or nothing at all.

Who am I? The launcher's environment tells, in this order: torchrun, MPI (MPICH, Intel MPI, Open MPI), srun, alone
(MPI before SLURM, for inside a batch job mpiexec leaves SLURM_PROCID 0 in every process). mpi4py is imported only
under mpiexec, and only to agree on an address; tensors travel by gloo on CPU and NCCL on GPUs.

`run_main` wraps every script: an error is one line and a documented exit code, and a process that fails takes the
others with it instead of leaving them waiting.
"""

import atexit
import contextlib
import ctypes
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch as th
import torch.distributed as dist

from . import checkpoint, logger
from .config import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_PEER, EXIT_STOPPED, EXIT_TRAINING, EXIT_USER, debug_wanted

GPUS_PER_NODE = 8  # upstream's constant; kept for its importers, nothing here assumes it
SETUP_RETRY_COUNT = 3
TIMEOUT = timedelta(minutes=30)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of settings, from glibc's malloc.h
KEPT_BYTES, OLD_GLIBC_KEEPS = 1 << 28, 1 << 25  # larger tensors come from the system and go back to it at once
MADV_HUGEPAGE, HUGE_PAGE, HEAP_BYTES = 14, 1 << 21, 3 << 29  # the first of Linux's mman.h

PEER_LOST = "Connection closed by peer", "Connection reset by peer", "Timed out waiting"  # as gloo says it
READER_LOST = "DataLoader worker (pid", "allocate shared memory", "unable to write to file </torch_"  # as PyTorch does

_store = None  # the rendezvous of this job; failing processes find each other through it
_words: Any = None  # the group that plain values travel by: always CPU, so that asking costs no GPU synchronisation


T = TypeVar("T")


class EnvironmentFault(RuntimeError):
    """The machine is not as the command needs it (launcher, GPUs, packages). Exit code 3."""


class StopRequested(Exception):
    """The run was asked to stop (signal, STOP file, time limit) and has saved. Exit code 75."""


class Launch(NamedTuple):
    """Who this process is within its job."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int


def detect_launch(env: Any = None) -> Launch:
    """Read the launcher's environment (facts measured for torchrun, MPICH 5, Open MPI 5, srun)."""
    env = os.environ if env is None else env

    def read(launcher, *names):
        rank, size, local_rank, local_size = (int(env.get(name, default)) for name, default in names)
        return Launch(launcher, rank, size, local_rank, local_size)

    if "RANK" in env and "WORLD_SIZE" in env:
        local = ("LOCAL_RANK", env["RANK"]), ("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])
        return read("torchrun", ("RANK", 0), ("WORLD_SIZE", 1), *local)
    if "OMPI_COMM_WORLD_RANK" in env:
        names = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"]
        names += ["OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"]
        return read("mpi", *zip(names, (0, 1, 0, 1), strict=True))
    if "PMI_RANK" in env:
        names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
        return read("mpi", *zip(names, (0, 1, env["PMI_RANK"], env.get("PMI_SIZE", 1)), strict=True))
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        names = ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE"]
        tasks = re.match(r"\d+", env.get("SLURM_TASKS_PER_NODE", "1"))
        env = {**env, "SLURM_TASKS_PER_NODE": tasks.group() if tasks else "1"}
        return read("slurm", *zip(names, (0, 1, 0, 1), strict=True))
    return Launch("alone", 0, 1, 0, 1)


def setup_dist() -> None:
    """Join the job's process group. Collective: call on every process; a second call does nothing.

    Raises:
        EnvironmentFault: mpiexec without a matching mpi4py, or more processes than GPUs.
    """
    global _store, _words
    if dist.is_initialized():
        return
    me = detect_launch()
    backend = _choose_backend(me)
    if me.launcher == "alone":
        _store = dist.HashStore()
    elif me.launcher == "mpi":
        _store = _rendezvous_by_mpi(me)
    else:
        host, port = _rendezvous_by_environment(me)
        agent = me.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        _store = dist.TCPStore(host, port, me.size, is_master=me.rank == 0 and not agent, timeout=TIMEOUT)
    dist.init_process_group(backend, store=_store, rank=me.rank, world_size=me.size, timeout=TIMEOUT)
    _words = dist.new_group(backend="gloo", timeout=TIMEOUT) if backend != "gloo" else None


def _choose_backend(me: Launch) -> str:
    if not th.cuda.is_available():
        return "gloo"
    if me.local_size > th.cuda.device_count():
        raise EnvironmentFault(
            f"{me.local_size} processes on this machine, but {th.cuda.device_count()} GPUs: start one process a GPU"
        )
    th.cuda.set_device(me.local_rank)
    return "nccl"


def _rendezvous_by_mpi(me: Launch) -> dist.TCPStore:
    """Rank 0 opens a store on a port that the system chooses, and tells the others by MPI: no port race."""
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        os.environ.setdefault("MPI4PY_MPIABI", "openmpi")  # mpi4py's own choice would be the MPICH beside it
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise EnvironmentFault(
            "started by mpiexec, but mpi4py cannot be imported: pip install mpi4py mpich, or use torchrun"
        ) from error
    world = MPI.COMM_WORLD
    if world.size != me.size:
        raise EnvironmentFault(
            f"mpiexec started {me.size} processes, but mpi4py sees {world.size}: mpiexec and mpi4py belong to different"
            " MPIs; install one of them only (pip install mpich) and check `which mpiexec`"
        )
    one_machine = world.Split_type(MPI.COMM_TYPE_SHARED).size == world.size
    host = "127.0.0.1" if one_machine else os.environ.get("MASTER_ADDR") or MPI.Get_processor_name()
    store = None
    if me.rank == 0:
        store = dist.TCPStore(host, 0, me.size, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    host, port = world.bcast((host, store.port) if store else None)
    return store or dist.TCPStore(host, port, me.size, is_master=False, timeout=TIMEOUT)


def _rendezvous_by_environment(me: Launch) -> tuple[str, int]:
    if me.launcher == "torchrun" or "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    nodes = os.environ.get("SLURM_STEP_NODELIST", "localhost")
    return first_host(nodes), 20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[03-05,9],cpu1` -> `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?", nodelist)
    assert found, nodelist
    return found.group(1) + (found.group(2) or "")


def rank() -> int:
    """This process's number in the job; before `setup_dist`, what the environment tells."""
    return dist.get_rank() if dist.is_initialized() else detect_launch().rank


def world_size() -> int:
    """How many processes the job has."""
    return dist.get_world_size() if dist.is_initialized() else detect_launch().size


def dev() -> th.device:
    """The device of this process: its GPU, or the CPU."""
    return th.device("cuda", th.cuda.current_device()) if th.cuda.is_available() else th.device("cpu")


def load_state_dict(path, **kwargs):
    """Collective: call on every process. Rank 0 reads, the others receive; a damaged file is an error on all of them.

    Args:
        path: a .pt, .ckpt or .safetensors file of tensors and plain values.
        kwargs: `map_location`, as for `torch.load`.
    """
    return rank0_first(lambda: checkpoint.load(path, **kwargs))


def rank0_first(function: Callable[[], T]) -> T:
    """Collective: call on every process. Rank 0 computes, all receive its value, or its error."""
    if world_size() == 1:
        return function()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=_words)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def sync_params(params) -> None:
    """Collective: call on every process. Give all processes rank 0's values, in place."""
    if world_size() > 1:
        for param in params:
            dist.broadcast(param.data, 0)


def average_gradients(params) -> None:
    """Collective: call on every process. Replace every gradient by its mean over the processes, in one exchange."""
    gradients = [param.grad for param in params if param.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = th.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def any_rank(flag: bool) -> bool:
    """Collective: call on every process. Whether the flag is set on any of them."""
    if world_size() == 1:
        return flag
    vote = th.tensor([float(flag)])
    dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=_words)
    return bool(vote.item())


def gather_objects(obj) -> list:
    """Collective: call on every process. Every process's plain Python value, in rank order, on all of them."""
    if world_size() == 1:
        return [obj]
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, obj, group=_words)
    return everyone


def run_main(main) -> None:
    """Run a script's `main()` and leave with the documented exit code; an error is one line on standard error.

    0 done, 2 the user's input, 3 the environment, 4 training failed, 5 a peer was lost, 75 stopped and saved.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:  # a name that the terminal cannot show must not end the run
            reconfigure(errors="backslashreplace")
    keep_freed_memory()
    try:
        main()
        code = EXIT_DONE
    except SystemExit as leaving:  # argparse's --help
        code = leaving.code if isinstance(leaving.code, int) else EXIT_DONE
    except BrokenPipeError:  # `... | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    except BaseException as error:
        code = _report(error)
        _leave_together(code)
    several = world_size() > 1
    _close()
    if several:
        _leave_without_destructors(code)
    sys.exit(code)


def print_comment(line: str) -> None:
    """Print beside a printed run, which stays a recipe; the first process does."""
    if rank() == 0:
        print("#", line.replace("\n", "\n# "))


def keep_freed_memory() -> None:
    """Let the process keep what tensors on a CPU leave for the next ones, where the C library is glibc.

    By itself it gives the top of its memory back to the system when a step ends, and the next step asks for it again,
    page by page: 20,000 faults in a training step of a small U-Net, an eighth of its time on one core.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        if not libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES):
            libc.mallopt(M_MMAP_THRESHOLD, OLD_GLIBC_KEEPS)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        _ask_for_huge_pages(libc)


def _ask_for_huge_pages(libc) -> None:
    """Tell Linux that the next 1.5 GiB of the heap may be of huge pages: a processor finds 500 times more of them.

    Memory is used no sooner than before. Where the heap may not grow so far, or Linux has none, all stays as it was.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = OLD_GLIBC_KEEPS // 2
    blocks = [block for block in (libc.malloc(size) for _ in range(HEAP_BYTES // size)) if block]
    if blocks:
        begin = -(-min(blocks) // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(begin, max(blocks) - begin, MADV_HUGEPAGE)
    for block in blocks:
        libc.free(block)


def _leave_without_destructors(code: int) -> None:
    """Leave as Python does, with MPI's Finalize (or mpiexec ends whoever still works), but not as C++ does.

    PyTorch's DistributedDataParallel never lets go of its process group, and the end of a process with the group's
    threads still running has aborted jobs that were done.
    """
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and not mpi.Is_finalized():  # mpi4py's own call comes after Python's exit, where we do not come
        mpi.Finalize()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)


def exit_code(error: BaseException) -> int | None:
    """The documented code of an error; None for one that only a programming mistake can cause."""
    if isinstance(error, (StopRequested, KeyboardInterrupt)):
        return EXIT_STOPPED
    if isinstance(error, (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return EXIT_USER
    if isinstance(error, (OSError, EnvironmentFault, ImportError)) and not isinstance(error, ConnectionError):
        return EXIT_ENVIRONMENT  # a full disk, no rights, a package that is not there
    if type(error).__name__ == "TrainingDiverged" or isinstance(error, (th.OutOfMemoryError, MemoryError)):
        return EXIT_TRAINING
    if "can't allocate memory" in str(error):  # PyTorch's allocator on a CPU, which raises RuntimeError
        return EXIT_TRAINING
    if _is_reader_lost(error):
        return EXIT_TRAINING
    if isinstance(error, dist.DistBackendError) or any(words in str(error) for words in PEER_LOST):
        return EXIT_PEER
    return None


def _is_reader_lost(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(words in str(error) for words in READER_LOST)


def _report(error: BaseException) -> int:
    """Say what happened, once: rank 0 at once, any other a moment later and only if rank 0 has not said the same."""
    code, me = exit_code(error), rank()
    message = " ".join(str(error).split()) or type(error).__name__
    if code == EXIT_PEER:
        message = f"another process of this job has ended or hangs ({message})"
    if _is_reader_lost(error):
        why = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ").strip(" .")
        message = (
            f"a process that reads data was ended by the machine, which lacks memory or room in /dev/shm ({why}):"
            " give a smaller --num_workers; 0 reads without such processes"
        )
    if not _said_by_rank_0(message):
        if code is None or debug_wanted():
            traceback.print_exception(error)
        if code is not None and (me == 0 or _store is not None):
            word = "stopped" if code == EXIT_STOPPED else "error"
            print(f"{word}{f' (rank {me})' if me else ''}: {message}", file=sys.stderr, flush=True)
    return 1 if code is None else code


def _said_by_rank_0(message: str) -> bool:
    """Whether rank 0 failed with these words; rank 0 leaves its own for the others to find."""
    if world_size() == 1 or _store is None:
        return False
    with contextlib.suppress(Exception):
        if rank() == 0:
            _store.set("said", message)
            return False
        time.sleep(1.0)
        return _store.check(["said"]) and _store.get("said").decode() == message
    return False


def _leave_together(code: int) -> None:
    """End every process of the job with this code: quietly if all failed, by MPI's Abort if some still wait."""
    if world_size() == 1 or _store is None:
        return
    with contextlib.suppress(Exception):
        failed = _store.add("failed", 1)
        deadline = time.monotonic() + 3.0
        while failed < world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
            failed = _store.add("failed", 0)
        if failed >= world_size():
            return
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None:
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def _close() -> None:
    logger.reset()
    if dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
