"""`--help` without PyTorch, which takes longer to load than the help to read.

Flags are fields of dataclasses, and those stand beside the code that they configure. For a command that only prints
them, what that code computes with is replaced by a name that can be asked for anything and gives itself.
"""

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

HEAVY = "torch", "scipy", "safetensors"
FOLDERS = "scripts", "evaluations"  # beside this package, or in it: where our commands lie


class _Anything(type):
    """A class whose attributes, calls, items, unions and negatives are itself; others can be derived from it."""

    def __getattr__(cls, name):
        if name.startswith("__"):  # what Python asks of a class is for `type` to say
            raise AttributeError(name)
        return cls

    def __call__(cls, *args, **kwargs):
        return cls

    def __getitem__(cls, key):
        return cls

    def __or__(cls, other):
        return cls

    __ror__ = __mul__ = __rmul__ = __or__

    def __neg__(cls):
        return cls

    def __bool__(cls):  # `if dist.is_initialized()`: nothing has happened
        return False


class _Hollow(ModuleType):
    """A module of which every name is anything."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in HEAVY:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Hollow(spec.name)

    def exec_module(self, module):
        pass


def is_help(argv: list[str]) -> bool:
    """Whether a command line asks one of our commands for its help, and for nothing else."""
    command = Path(argv[0]) if argv and argv[0] else Path()
    here = Path(__file__).resolve().parent
    ours = [place / folder for place in (here, here.parent) for folder in FOLDERS]
    return not {"-h", "--help"}.isdisjoint(argv[1:]) and command.is_file() and command.resolve().parent in ours


def install() -> None:
    """From here on this process can print help, but compute nothing; not if PyTorch is loaded already."""
    if not set(HEAVY) & set(sys.modules):
        sys.meta_path.insert(0, _Finder())
