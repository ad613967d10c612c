"""Our training loop in processes of its own, driven from another one, as `python` and `mpiexec -n N` run it.

There it has the settings of our scripts for the whole process, which rivals must not profit from. Several processes
share the threads, and together see the batch of the case: they average their gradients, so a step of theirs is one of
the case's. The official code cannot do that on a CPU: without CUDA it leaves gradients as they are, and says so.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import contenders
import torch as th
from contenders import Case, OurTraining, scratch

from guided_diffusion_vae import dist_util


class RanksTraining:
    """The training loop of a case on `ranks` processes; `close` ends them.

    Args:
        flags: more of our flags; with `seed` the draws are the same whatever the number of processes.
    """

    def __init__(self, case: Case, ranks: int = 1, **flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": str(max(1, th.get_num_threads() // ranks))}
        words = [sys.executable, __file__, json.dumps({"batch": case.batch, "case": case.flags, "flags": flags})]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        each = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self.processes = [subprocess.Popen(words, env=environment, **pipes) for environment in each]
        self._hear()

    def step(self) -> None:
        """One update."""
        self._ask("")

    def gradient(self) -> tuple[th.Tensor, th.Tensor]:
        """See `contenders.loss_and_gradient`; of the whole batch."""
        with scratch() as folder:
            self._ask(str(folder))
            parts = [th.load(folder / f"{rank}.pt") for rank in range(len(self.processes))]
        return th.cat([losses for losses, _ in parts]), parts[0][1]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.communicate()

    def _ask(self, word: str) -> None:
        for process in self.processes:
            process.stdin.write(f"{word}\n")
            process.stdin.flush()
        self._hear()

    def _hear(self) -> None:
        for process in self.processes:
            if process.stdout.readline() != "done\n":
                raise RuntimeError(f"a process of the training ended with code {process.wait()}")


def serve(about: dict) -> None:
    """One of the processes: a step for each empty line of stdin, its gradient into the folder that a line names."""
    done, sys.stdout = sys.stdout, sys.stderr
    dist_util.keep_freed_memory()
    contenders.start()
    whole, rank = Case("", about["batch"], about["case"]), dist_util.rank()
    size = whole.batch // dist_util.world_size()
    mine, (batch, cond) = slice(rank * size, (rank + 1) * size), whole.data()
    loop = OurTraining(replace(whole, batch=size), weights=whole.weights, **about["flags"])
    loop.batch = batch[mine], {name: value[mine] for name, value in cond.items()}
    print("done", file=done, flush=True)
    for line in sys.stdin:
        if folder := line.strip():
            th.save(loop.gradient(), Path(folder, f"{rank}.pt"))
        else:
            loop.step()
        print("done", file=done, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
