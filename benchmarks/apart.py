"""Training loops and samplers in processes of their own, driven from another one, as their scripts run them.

Ours has there the settings of our scripts for the whole process, which rivals must not profit from; a rival has those
that every process begins with. What a process of the official code gives back of its memory and asks for anew at every
step is for chance to say (seldom nothing, which makes its sampling a fifth faster), so a rival goes on in a new process
every second round; several that wait in memory would slow ours down. A training of ours may be shared by several
processes, as `mpiexec -n N` starts them: they share the threads, together see the batch of the case, and average their
gradients, so a step of theirs is one of the case's. The official code cannot do that on a CPU: without CUDA it leaves
gradients as they are, and says so.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import cases
import contenders
import rivals
import torch as th
from contenders import Case, OurTraining, scratch

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.image_datasets import load_data_with_vae


class Apart:
    """Something that is done again and again in processes of its own; `close` ends them.

    Args:
        warm_up: how often it is done before it is as quick as it stays.
    """

    def __init__(self, case: Case, work: dict, *, ranks: int = 1, warm_up: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": str(max(1, th.get_num_threads() // ranks))}
        self.words = [sys.executable, __file__, json.dumps({"batch": case.batch, "case": case.flags, **work})]
        self.each = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self.turns, self.warm_up = 0, warm_up
        self._start()

    def _start(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.processes = [subprocess.Popen(self.words, env=environment, **pipes) for environment in self.each]
        self._hear()

    def turn(self) -> None:
        """Before every second round, go on in new processes, warmed up."""
        if self.turns % 2 == 0:
            if self.turns:
                self.close()
                self._start()
            for _ in range(self.warm_up):
                self.run()
        self.turns += 1

    def run(self) -> None:
        """Do it once."""
        self._ask("")

    def results(self) -> list:
        """Of each process what it says of its work."""
        with scratch() as folder:
            self._ask(str(folder))
            return [th.load(folder / f"{rank}.pt") for rank in range(len(self.processes))]

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
                for each in self.processes:
                    each.kill()
                raise RuntimeError(f"a process of the benchmark ended with code {process.wait()}")


class ApartTraining(Apart):
    """The training loop of a case.

    Args:
        case: one with a `data_dir` reads its pictures by the loader of `who`, others see one batch again and again.
        who: one of `TRAININGS`.
        flags: more of our flags; with `seed` the draws are the same whatever the number of processes.
    """

    def __init__(self, case: Case, who: str = "ours", ranks: int = 1, **flags):
        super().__init__(case, {"training": who, "flags": flags}, ranks=ranks, warm_up=8)

    def gradient(self) -> tuple[th.Tensor, th.Tensor]:
        """See `contenders.loss_and_gradient`; of the whole batch. Of ours and the official one."""
        parts = self.results()
        return th.cat([losses for losses, _ in parts]), parts[0][1]


class ApartSampler(Apart):
    """Walks of so many steps; `results` are the samples.

    Args:
        who: one of `SAMPLERS`.
        flags: more of our flags; of diffusers' networks the `scheduler`.
    """

    def __init__(self, case: Case, steps: int, who: str = "ours", **flags):
        super().__init__(case, {"sampling": who, "steps": steps, "flags": flags}, warm_up=2)


TRAININGS = {
    "ours": lambda case, flags: share_of(case, flags),
    "official": lambda case, flags: rivals.OfficialTraining(case),
    **{
        name: lambda case, flags, make=make: rivals.DiffusersTraining(case, make(case))
        for name, make in cases.DIFFUSERS.items()
    },
}
LOADERS = {
    "ours": lambda case: load_data_with_vae(**files_of(case), vae=case.vae, say=lambda line: None),
    "official": lambda case: rivals.official("image_datasets").load_data(**files_of(case)),
}
SAMPLERS = {
    "ours": lambda case, steps, place, flags: contenders.our_sampler(case, steps, place, **flags),
    "official": lambda case, steps, place, flags: rivals.official_sampler(case, steps),
    **{
        name: lambda case, steps, place, flags, make=make: rivals.diffusers_sampler(case, make(case), steps, **flags)
        for name, make in cases.DIFFUSERS.items()
    },
}


def files_of(case: Case) -> dict:
    """What both loaders want to know of the pictures."""
    return {"data_dir": case.run.data_dir, "batch_size": case.batch, "image_size": case.run.image_size}


def serve(about: dict) -> None:
    """One of the processes: works once for each empty line of stdin; a line that names a folder wants results there."""
    done, sys.stdout = sys.stdout, sys.stderr
    if "ours" in (about.get("training"), about.get("sampling")):
        dist_util.keep_freed_memory()
    contenders.start()
    case, rank = Case("", about["batch"], about["case"]), dist_util.rank()
    with scratch() as place:
        if "sampling" in about:
            work = results = SAMPLERS[about["sampling"]](case, about["steps"], place, about["flags"])
        else:
            loop = TRAININGS[about["training"]](case, about["flags"])
            batches = LOADERS[about["training"]](case) if case.run.data_dir else repeat(loop.batch)
            work, results = (lambda: step(loop, next(batches))), getattr(loop, "gradient", None)
        print("done", file=done, flush=True)
        for line in sys.stdin:
            if folder := line.strip():
                th.save(results(), Path(folder, f"{rank}.pt"))
            else:
                work()
            print("done", file=done, flush=True)


def step(loop, batch) -> None:
    """One update by this batch."""
    loop.batch = batch
    loop.step()


def share_of(case: Case, flags: dict) -> OurTraining:
    """This process's share of a training."""
    size = case.batch // dist_util.world_size()
    mine, (batch, cond) = slice(dist_util.rank() * size, (dist_util.rank() + 1) * size), case.data()
    loop = OurTraining(replace(case, batch=size), weights=case.weights, **flags)
    loop.batch = batch[mine], {name: value[mine] for name, value in cond.items()}
    return loop


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
