"""Who holds the weights: every process all of them, or each a share.

`Whole` is the usual way: every process has the model, and gradients are averaged (DistributedDataParallel). `Shares` is
PyTorch's FSDP2: of every parameter P, gradient, moment and average a process keeps the rows of its rank,

    P = [P_0; P_1; ...; P_(R-1)]   (torch.chunk along the first dimension, R processes)

and the blocks of the network are put together one by one, just before they compute, and taken apart after. The
arithmetic is that of `Whole`, so the result is, too, up to the rounding of sums. Both offer the same verbs to the loop.

A sharded checkpoint has the same one-file weights, for whoever samples; what a run goes on from lies beside them in
`shards000010/`, written by torch.distributed.checkpoint, which every process can see and any number of them can read.
"""

import contextlib
import enum
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch as th
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, dist_util, logger
from .config import UserError
from .fp16_util import MixedPrecisionTrainer, norm_of
from .run_state import clear_shards, commit, describe, remove, shards_folder, write_checkpoint

CONTENTS = {  # what the table of contents of shards is made of
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
}


class Kept(NamedTuple):
    """What a checkpoint keeps of a run."""

    trainer: MixedPrecisionTrainer
    averages: list[tuple[float | str, list[th.Tensor]]]  # rate or name, tensors in the order of the trainer's masters
    opt: th.optim.Optimizer


def create_sharding(name: str) -> "Whole | Shares":
    """The way of that name: none or fsdp2."""
    return {"none": Whole, "fsdp2": Shares}[name]()


class Whole:
    """Every process holds the model."""

    loads_weights = False  # whether `load` brings the model's weights, too
    norm = staticmethod(norm_of)

    def refuse_other(self, path: str, state: dict) -> None:
        """Raise if a checkpoint was saved the other way.

        Raises:
            UserError: names the flag that resumes it.
        """
        if state.get("sharding", "none") != "none":
            raise UserError(
                f"--sharding none: {path} was saved by --sharding {state['sharding']}; give that to go on with it"
                " (one process is enough)"
            )

    def place(self, model: th.nn.Module) -> None:
        """Collective: call on every process. Put the model onto the device, with rank 0's weights."""
        model.to(dist_util.dev())
        dist_util.sync_params(model.parameters())

    def wrap(self, model: th.nn.Module) -> th.nn.Module:
        """Collective: call on every process. What to call in training, so that gradients are averaged."""
        if dist_util.world_size() == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[dist_util.dev().index] if th.cuda.is_available() else None,
            bucket_cap_mb=128,
            find_unused_parameters=False,
        )

    def accumulating(self, wrapped: Any, last: bool):
        """The context of one microbatch: gradients wait for the last one to be averaged."""
        return contextlib.nullcontext() if last or dist_util.world_size() == 1 else wrapped.no_sync()

    def evaluating(self, model: th.nn.Module):
        """The context in which processes may call the model on their own, as often as each of them likes."""
        return contextlib.nullcontext()

    def gather(self, state_dict: dict) -> dict:
        """Collective: call on every process. The whole tensors of a state_dict, on rank 0 at least."""
        return state_dict

    def load(self, path: str, number: int, kept: Kept, state: dict) -> bool:
        """Collective: call on every process. Read, in place, what lies beside a model file.

        Returns:
            whether the optimizer's state was there.
        Raises:
            UserError: it does not fit.
        """
        for rate, params in kept.averages:
            file = self._companion(path, f"ema_{rate}_{number:06d}.pt")
            if file:
                logger.log(f"loading EMA from checkpoint: {file}...")
                weights = dist_util.load_state_dict(file, map_location=dist_util.dev())
                for param, value in zip(params, kept.trainer.state_dict_to_master_params(weights), strict=True):
                    param.detach().copy_(value.detach())
        file = self._companion(path, f"opt{number:06d}.pt")
        if not file:
            return False
        logger.log(f"loading optimizer state from checkpoint: {file}")
        try:
            kept.opt.load_state_dict(dist_util.load_state_dict(file, map_location=dist_util.dev()))
        except ValueError as error:
            raise UserError(f"{file} does not fit ({error}); was it saved with another --use_fp16?") from error
        return True

    def _companion(self, path: str, name: str) -> str | None:
        file = Path(path).with_name(name)
        return str(file) if dist_util.rank0_first(file.is_file) else None

    def save(self, folder: Path, number: int, kept: Kept, state: dict) -> None:
        """Collective: call on every process. Write a checkpoint and commit it.

        Raises:
            SaveError: the disk is full; earlier checkpoints are intact.
        """

        def write():
            files = {
                name: kept.trainer.master_params_to_state_dict(params)
                for name, params in _weights_files(kept, number).items()
            }
            write_checkpoint(folder, number, {**files, f"opt{number:06d}.pt": kept.opt.state_dict()}, state)

        dist_util.rank0_first(write)


class Shares:
    """Each process holds a share: FSDP2 over all processes. The verbs are those of `Whole`.

    bfloat16 is autocast's, as without sharding, so that sharding changes where numbers lie and not what they are;
    FSDP's own policy would round the times, the norms' weights and the sums between blocks, too. Its price is a copy of
    the blocks' weights (2 bytes each) from forward to backward, which `--use_checkpoint True` saves.
    """

    loads_weights = True

    def refuse_other(self, path: str, state: dict) -> None:
        if state.get("sharding") != "fsdp2":
            raise UserError(f"--sharding fsdp2: {path} was saved by --sharding none; give that to go on with it")

    def place(self, model: th.nn.Module) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        # The transformer's output is a view, which would matter if a loss wrote into it: none does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        dist_util.setup_dist()
        device = dist_util.dev()
        for param in model.parameters():  # one by one: the whole model may not fit the device
            value = param.detach().to(device)
            dist_util.sync_params([value])
            param.detach().copy_(value)
        assert dist.group.WORLD is not None
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
        blocks = [part for part in blocks_of(model) if next(part.parameters(), None) is not None]
        self.parts: list[Any] = [*blocks, model]
        self.can_switch = hasattr(FSDPModule, "set_reshard_after_forward")  # since torch 2.8
        for part in self.parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=self.can_switch and part is not model)
        model.to(device)  # buffers that FSDP left

    def wrap(self, model: th.nn.Module) -> th.nn.Module:
        return model

    def accumulating(self, wrapped: th.nn.Module, last: bool):
        """Gradients are averaged and shared out after every microbatch: kept for the last, they would be whole."""
        return contextlib.nullcontext()

    def norm(self, tensors: list) -> th.Tensor:
        """Collective: call on every process. The 2-norm of whole tensors, of which each process has shares."""
        square = norm_of([tensor.to_local() for tensor in tensors]) ** 2
        dist.all_reduce(square)
        return square.sqrt()

    @contextlib.contextmanager
    def evaluating(self, model: th.nn.Module):
        """Collective: call on every process. All weights are on every process for as long as the block lasts.

        Otherwise a process with fewer rows to validate would let the others wait for ever.
        """
        try:
            for part in self.parts:
                self._keep_whole(part, True)
                part.unshard()
            yield
        finally:
            for part in self.parts:
                self._keep_whole(part, part is model)
                part.reshard()

    def _keep_whole(self, part, whole: bool):
        if self.can_switch:
            part.set_reshard_after_forward(not whole, recurse=False)

    def gather(self, state_dict: dict) -> dict:
        """Collective: call on every process. One tensor at a time; rank 0 keeps them, the others get {}."""
        from torch.distributed.tensor import DTensor

        whole = {}
        for name, value in state_dict.items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if dist_util.rank() == 0:
                whole[name] = value.detach().cpu()
        return whole

    def load(self, path: str, number: int, kept: Kept, state: dict) -> bool:
        import torch.distributed.checkpoint as dcp

        folder = shards_folder(Path(path).parent, number)
        reader = _reader(folder)
        saved = reader.read_metadata().state_dict_metadata
        named = list(zip(_names(kept), kept.trainer.master_params, strict=True))
        for name, param in named:
            moments = [key for key in saved if key.startswith(f"opt.{name}.")]
            if moments:
                fresh = {key.removeprefix(f"opt.{name}."): key for key in moments}
                kept.opt.state[param] = {
                    key: th.zeros(()) if saved[full].size == th.Size() else th.zeros_like(param.detach())
                    for key, full in fresh.items()
                }
        tensors = _flat(kept)
        absent = {f"ema_{rate}." for rate, _ in kept.averages if not any(k.startswith(f"ema_{rate}.") for k in saved)}
        tensors = {key: value for key, value in tensors.items() if not key.startswith(tuple(absent))}
        for key, value in tensors.items():
            size = getattr(saved.get(key), "size", None)
            if size != value.shape:
                raise UserError(
                    f"--resume_checkpoint {path} is a network of another shape: {key} is"
                    f" {'absent' if size is None else tuple(size)} there and {tuple(value.shape)} here"
                )
        logger.log(f"loading weights, averages and optimizer from checkpoint: {folder}...")
        dcp.load(tensors, storage_reader=reader)
        for rate, params in kept.averages:
            if f"ema_{rate}." in absent:
                for param, master in zip(params, kept.trainer.master_params, strict=True):
                    param.copy_(master.detach())
        kept.opt.load_state_dict({**kept.opt.state_dict(), "param_groups": state["param_groups"]})
        return True

    def save(self, folder: Path, number: int, kept: Kept, state: dict) -> None:
        dist_util.rank0_first(lambda: clear_shards(folder, number))
        shards, files = shards_folder(folder, number), _weights_files(kept, number)
        try:
            _save_shards(_flat(kept), shards)
            for name, params in files.items():
                whole = self.gather(kept.trainer.master_params_to_state_dict(params))
                dist_util.rank0_first(lambda name=name, whole=whole: checkpoint.save(whole, folder / name))
            names = dist_util.rank0_first(lambda: [f"{shards.name}/{path.name}" for path in sorted(shards.iterdir())])
            mine = [*names, *files][dist_util.rank() :: dist_util.world_size()]
            described = {}
            for part in dist_util.gather_objects(describe(folder, mine)):
                described |= part
            state = {**state, "sharding": "fsdp2", "param_groups": kept.opt.state_dict()["param_groups"]}
            dist_util.rank0_first(lambda: commit(folder, number, described, state))
        except OSError:
            if dist_util.rank() == 0:
                remove(folder, files)
                clear_shards(folder, number)
            raise


def blocks_of(model: th.nn.Module) -> list[th.nn.Module]:
    """The blocks of a transformer or a U-Net, in the order in which they compute; [] for any other network."""
    network: Any = model
    if hasattr(model, "blocks"):
        return list(network.blocks)
    if hasattr(model, "middle_block"):
        return [*network.input_blocks, network.middle_block, *getattr(model, "output_blocks", [])]
    return []


def _names(kept: Kept) -> list[str]:
    return [name for name, _ in kept.trainer.model.named_parameters()]


def _weights_files(kept: Kept, number: int) -> dict[str, Sequence[th.Tensor]]:
    """Upstream's names, and the tensors that belong there."""
    files: dict[str, Sequence[th.Tensor]] = {f"model{number:06d}.pt": kept.trainer.master_params}
    return files | {f"ema_{rate}_{number:06d}.pt": params for rate, params in kept.averages}


def _flat(kept: Kept) -> dict[str, th.Tensor]:
    """All that shards hold, by name: `model.NAME`, `ema_RATE.NAME`, `opt.NAME.exp_avg`, ..."""
    names, tensors = _names(kept), {}
    for group, params in (("model", kept.trainer.master_params), *((f"ema_{rate}", p) for rate, p in kept.averages)):
        tensors |= {f"{group}.{name}": param.detach() for name, param in zip(names, params, strict=True)}
    for name, param in zip(names, kept.trainer.master_params, strict=True):
        tensors |= {f"opt.{name}.{key}": value for key, value in kept.opt.state.get(param, {}).items()}
    return tensors


def _save_shards(tensors: dict[str, th.Tensor], folder: Path) -> None:
    """Collective: call on every process. An error of one is an error of all."""
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
    except dcp.CheckpointException as error:
        first = next(failure for failure, _ in error.failures.values())
        if not isinstance(first, (OSError, RuntimeError)):
            raise
        raise checkpoint.SaveError(f"cannot write {folder}: {first}; earlier checkpoints are intact") from error
    dist_util.rank0_first(lambda: checkpoint.sync_folder(folder))


def _reader(folder: Path):
    """A reader of shards that takes data only: PyTorch's own unpickles the table of contents without looking."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            with open(folder / ".metadata", "rb") as handle:
                try:
                    metadata = _DataOnly(handle).load()
                except (pickle.UnpicklingError, EOFError, AttributeError) as error:
                    raise UserError(f"{folder / '.metadata'} is damaged or holds more than data ({error})") from error
            metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


class _DataOnly(pickle.Unpickler):
    """Unpickles what a table of contents of shards is made of, and nothing else."""

    def find_class(self, module, name):
        if module.partition(".")[0] == "pathlib":
            return PurePosixPath
        if (module, name) == ("builtins", "getattr"):  # by which Python before 3.11.4 names a member of an enumeration
            return _member
        found = super().find_class(module, name) if module in CONTENTS and "." not in name else None
        if isinstance(found, (th.dtype, th.layout)) or name in CONTENTS.get(module, ()):
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def _member(kind: Any, name: str) -> Any:
    """An enumeration's member, in place of `getattr`, which would reach everything."""
    if not isinstance(kind, enum.EnumType) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"getattr of {kind}")
    return kind.__members__[name]
