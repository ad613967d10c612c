"""A network made into machine code of its own by `torch.compile`, for long jobs.

On a CPU the weights of one that no longer learns are laid out for their convolutions once and for all, and norms,
activations and sums are done in one pass over memory; the results differ in the last digits. On a GPU its kernels are
launched as one CUDA graph. What is compiled holds for one number of images: smaller batches, such as the last one of a
job, are filled up.
"""

import os
import shutil
from collections.abc import Callable

import torch as th


def compile_network(model: th.nn.Module, say: Callable[[str], object], *, backend: str = "inductor") -> bool:
    """Compile a network that no longer learns, in place; what cannot be compiled runs as before.

    Args:
        model: (x, t, **cond) -> prediction; x (N, ...), all tensors of `cond` (N,), N the same in all.
        say: is told in a line why it runs as before.
        backend: of torch.compile.
    Returns:
        whether it will be compiled, at its first call.
    """
    on_cpu = not next(model.parameters()).is_cuda
    if not _can_compile(on_cpu, backend, say, "sampling"):
        return False
    import torch._inductor.config as settings

    settings.freezing = on_cpu
    if on_cpu:
        # from which the compiler makes a better layout than ours
        model.to(memory_format=th.contiguous_format)  # pyright: ignore[reportCallIssue]  # torch declares no memory_format
    mode = None if on_cpu or backend != "inductor" else "reduce-overhead"  # with CUDA graphs
    compiled, sizes = th.compile(model.forward, dynamic=False, backend=backend, mode=mode), set()

    def forward(x, t, **cond):
        n = len(x)
        size = min((known for known in sizes if known >= n), default=n)
        sizes.add(size)
        found = compiled(_filled(x, size), _filled(t, size), **{k: _filled(v, size) for k, v in cond.items()})[:n]
        return found.clone() if mode else found  # a CUDA graph writes over what it gave before

    model.forward = forward
    return True


def compile_training(network, say: Callable[[str], object], *, backend: str = "inductor"):
    """A network compiled for training, gradients and all; or itself, where it cannot be.

    It shares its weights with the one that was given, and makes the same random draws.

    Args:
        network: also wrapped for several processes; say, backend: as in `compile_network`.
    """
    on_cpu = not next(network.parameters()).is_cuda
    if not _can_compile(on_cpu, backend, say, "training"):
        return network
    import torch._inductor.config as settings

    settings.fallback_random = True
    return th.compile(network, dynamic=False, backend=backend)


def _can_compile(on_cpu: bool, backend: str, say: Callable[[str], object], work: str) -> bool:
    compiler = os.environ.get("CXX", "g++")
    if on_cpu and backend == "inductor" and shutil.which(compiler) is None:
        say(f"--compile True needs a C++ compiler, and {compiler} is not on the PATH: {work} without")
        return False
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True  # what fails to compile runs as before, with its warning
    return True


def _filled(value, size: int):
    """A tensor (N, ...) with its last row repeated up to so many; anything else as it is."""
    if not th.is_tensor(value) or len(value) == size:
        return value
    return th.cat([value, value[-1:].expand(size - len(value), *value.shape[1:])])
