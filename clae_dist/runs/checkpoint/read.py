"""Reader of checkpoints for any number of ranks and any backend: full tensors by name, one at a time."""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from clae_dist.config import Config
from clae_dist.errors import CheckpointError, ConfigError, DamagedError
from clae_dist.escape import say
from clae_dist.models import PretrainModel, build_model
from clae_dist.object_store import StoreError
from clae_dist.runs.checkpoint.index import DTYPES, Extent, File, open_inside, read_index
from clae_dist.runs.checkpoint.objects import Pieces, stage_checkpoints
from clae_dist.runs.checkpoint.pieces import sections
from clae_dist.runs.checkpoint.safetensors_file import bytes_of
from clae_dist.runs.folder import RunFolder
from clae_dist.staging import shown_path
from clae_dist.world import World

_CHUNK = 8 << 20
Say = Callable[[str], None]

_LAG_S = 60.0  # a host may see an outdated list of files on network storage for as long


class Checkpoint(Mapping[str, torch.Tensor]):
    """A checkpoint on disk: full tensors on the CPU, read on access, which must not be written to.

    Raises: DamagedError if checkpoint.json is damaged; `verify` checks the other files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_index(path)
        self._files: dict[str, Any] = {}
        self._pieces = Pieces.of(path)  # in the bucket, of a run on object storage

    @property
    def step(self) -> int:
        return self.index.step

    @property
    def info(self) -> dict[str, Any]:
        """State other than tensors: images_seen, train_s, bad_samples."""
        return self.index.info

    def state(self) -> dict[str, Any]:
        """The state for Backend.load_state."""
        return sections(self)

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.tensors)

    def __len__(self) -> int:
        return len(self.index.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.index.tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.index.tensors[name]
        dtype = DTYPES[tensor.dtype]
        if len(tensor.extents) == 1:
            return self._read(name, tensor.extents[0], dtype).view(tensor.shape)
        whole = torch.empty(torch.Size(tensor.shape).numel(), dtype=dtype)
        for extent in tensor.extents:
            whole[extent.start : extent.start + extent.length] = self._read(name, extent, dtype)
        return whole.view(tensor.shape)

    def _read(self, name: str, extent: Extent, dtype: torch.dtype) -> torch.Tensor:
        """The elements of one extent, memory-mapped from the file, or from the bucket where this node does not have it."""
        if self._pieces is not None and not (self.path / extent.file).exists():
            return self._pieces.read(name, extent, dtype)
        try:
            if extent.file not in self._files:
                os.close(open_inside(self.path, extent.file))  # a plain file of this folder
                self._files[extent.file] = safe_open(self.path / extent.file, framework="pt")
            row: torch.Tensor = self._files[extent.file].get_tensor(name).reshape(-1)
        except (SafetensorError, OSError) as error:
            raise DamagedError(f"{extent.file}: {name} cannot be read ({error})") from None
        if (row.dtype, row.numel()) != (dtype, extent.length):
            raise DamagedError(f"{extent.file}: {name} has {row.numel()} of {row.dtype}, not {extent.length} of {dtype}")
        return row

    def verify(self, share: int = 0, of: int = 1) -> None:
        """Check size and sha256 of every `of`-th file, which is fetched where it is in a bucket alone.

        Raises DamagedError, and StoreError if the bucket cannot be read.
        """
        for name in sorted(self.index.files)[share::of]:
            expected = self.index.files[name]
            try:
                self._verify_file(name, expected)
            except DamagedError:
                if self._pieces is None:
                    raise
                self._files.pop(name, None)
                self._pieces.fetch(name, expected)
                self._verify_file(name, expected)

    def _verify_file(self, name: str, expected: File) -> None:
        try:
            with open(open_inside(self.path, name), "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected.num_bytes:
                    raise DamagedError(f"{name} has {size:,} bytes, expected {expected.num_bytes:,}")
                sha256 = hashlib.sha256()
                buffer = memoryview(bytearray(_CHUNK))
                while count := file.readinto(buffer):
                    sha256.update(buffer[:count])
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
        if sha256.hexdigest() != expected.sha256:
            where = self._damaged_tensors(name)
            raise DamagedError(f"{name} has sha256 {sha256.hexdigest()[:12]}…, expected {expected.sha256[:12]}…{where}")
        self._check_header(name)

    def _check_header(self, file: str) -> None:
        """Check that a file holds the tensors in the index; a correct digest only proves that nothing has changed."""
        for name, tensor in self.index.tensors.items():
            for extent in tensor.extents:
                if extent.file == file:
                    self._read(name, extent, DTYPES[tensor.dtype])

    def _damaged_tensors(self, file: str) -> str:
        """The damaged tensors of a file, in words."""
        damaged = []
        for name, tensor in self.index.tensors.items():
            for extent in tensor.extents:
                if extent.file == file:
                    try:
                        crc32 = zlib.crc32(bytes_of(self._read(name, extent, DTYPES[tensor.dtype])))
                    except DamagedError:
                        return " (nothing in it is readable)"
                    if crc32 != extent.crc32:
                        damaged.append(name)
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        return f" (damaged: {damaged[0]}{more})" if damaged else " (its header; the tensors are intact)"


Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(model: torch.nn.Module) -> Shapes:
    """The shapes of a model's parameters and buffers by name, for `load_checkpoint`."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _misfit(checkpoint: Checkpoint, shapes: Shapes) -> str:
    """The reason why a checkpoint does not fit a model of these shapes, or ""."""
    missing = {f"model/{name}" for name in shapes} - set(checkpoint)
    if missing:
        return f"{min(missing)} is not in it"
    for name, tensor in checkpoint.index.tensors.items():
        section, _, key = name.partition("/")
        of = key.rpartition("/")[0] if section == "optimizer" else key
        expected = shapes.get(of)
        scalar = section == "optimizer" and tensor.shape in ((), (1,))
        if section in ("model", "average", "keys", "optimizer") and expected is None:
            return f"{name} is of no tensor of the model"
        if expected is not None and tensor.shape != expected and not scalar:
            return f"{name} has the shape {tensor.shape}, the model's is {expected}"
    return ""


def load_checkpoint(run_dir: Path, say: Say, world: World | None = None, shapes: Shapes | None = None) -> Checkpoint | None:
    """The newest intact checkpoint, or None without any; damaged ones are reported. Collective; ranks share the work.

    Args:
        shapes: those of the model; a checkpoint that does not fit them counts as damaged.

    Raises: ConfigError if there are checkpoints and all are damaged, RankError if ranks see different ones, CheckpointError if
    an object store cannot be used.
    """
    world = world or World.single("cpu")
    stage_checkpoints(run_dir, world)
    paths = RunFolder(run_dir).find_checkpoints()
    names = world.broadcast([path.name for path in paths])
    deadline = time.monotonic() + _LAG_S
    while [path.name for path in paths] != names and time.monotonic() < deadline:
        time.sleep(1.0)
        paths = RunFolder(run_dir).find_checkpoints()
    same = [path.name for path in paths] == names
    world.agree(same, f"ranks found different checkpoints; is {run_dir} on storage that all hosts share?")
    for path in paths:
        problem, unreachable, checkpoint = "", "", None
        try:
            checkpoint = Checkpoint(path)
            checkpoint.verify(world.rank, world.size)
            problem = _misfit(checkpoint, shapes) if shapes is not None else ""
        except DamagedError as error:
            problem = str(error)
        except StoreError as error:  # an outage does not make a checkpoint damaged
            unreachable = str(error)
        world.raise_together(CheckpointError, unreachable)
        problems = [text for text in world.gather_objects(problem) if text]
        if not problems:
            return checkpoint
        say(f"{shown_path(path)} is damaged: {problems[0]}; trying the one before.")
    if paths:
        raise ConfigError(
            f"run_dir is {shown_path(run_dir)!r}, where none of the {len(paths)} checkpoints can be read; "
            "restore one from a copy, or give another run_dir for a new run."
        )
    return None


def load_model(run_dir: Path) -> tuple[Config, PretrainModel, dict[str, Any]]:
    """A run's configuration, its model with the (averaged) weights of the newest whole checkpoint, and {"step", "images_seen"}.

    The model is on the CPU, in evaluation mode. Raises ConfigError without a run folder or checkpoint, and for weights that
    are NaN or infinite.
    """
    config = RunFolder(run_dir).read_config()
    model = build_model(config)
    checkpoint = load_checkpoint(run_dir, say, shapes=shapes_of(model))
    if checkpoint is None:
        shown = shown_path(run_dir)
        raise ConfigError(f"RUN is {shown!r}, which holds no checkpoint yet; start `clae train` with run_dir={shown}.")
    state = checkpoint.state()
    weights = dict(state.get("average", state["model"]))
    _refuse_nan(weights, checkpoint)
    model.load_state_dict(weights)
    return config, model.eval(), {"step": checkpoint.step, "images_seen": checkpoint.info["images_seen"]}


def _refuse_nan(weights: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    bad = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ConfigError(
            f"the weights after step {checkpoint.step} are NaN or infinite ({len(bad)} of {len(weights)} tensors, such as "
            f"{bad[0]}): training diverged, and no accuracy of them means anything. Remove {checkpoint.path} to take the "
            "checkpoint before it, and train with optim.clip_norm=1 or a lower optim.learning_rate."
        )
