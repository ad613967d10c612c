"""A network made into machine code of its own by `torch.compile`, for long sampling jobs.

On a CPU its weights are laid out for their convolutions once and for all, and norms, activations and sums are done in
one pass over memory; the results differ in the last digits. What is compiled holds for one number of images: smaller
batches, such as the last one of a job, are filled up.
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
    compiler = os.environ.get("CXX", "g++")
    if on_cpu and backend == "inductor" and shutil.which(compiler) is None:
        say(f"--compile True needs a C++ compiler, and {compiler} is not on the PATH: sampling without")
        return False
    import torch._dynamo
    import torch._inductor.config as settings

    torch._dynamo.config.suppress_errors = True  # what fails to compile runs as before, with its warning
    settings.freezing = on_cpu
    if on_cpu:
        # from which the compiler makes a better layout than ours
        model.to(memory_format=th.contiguous_format)  # pyright: ignore[reportCallIssue]  # torch declares no memory_format
    compiled, sizes = th.compile(model.forward, dynamic=False, backend=backend), set()

    def forward(x, t, **cond):
        n = len(x)
        size = min((known for known in sizes if known >= n), default=n)
        sizes.add(size)
        return compiled(_filled(x, size), _filled(t, size), **{k: _filled(v, size) for k, v in cond.items()})[:n]

    model.forward = forward
    return True


def _filled(value, size: int):
    """A tensor (N, ...) with its last row repeated up to so many; anything else as it is."""
    if not th.is_tensor(value) or len(value) == size:
        return value
    return th.cat([value, value[-1:].expand(size - len(value), *value.shape[1:])])
