"""Training checkpoints through torch.distributed.checkpoint: `checkpoints/step-00000100`, whole or absent.

A folder holds DCP's own files, with tensors only, and `state.json` with everything else (step, data position,
random states, the model's and the run's configuration). Nothing in it is unpickled except DCP's `.metadata`,
and that by a reader that knows a dozen harmless classes and refuses all others.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ostro.errors import ConfigError, Error, OutOfMemory, WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights.folder import not_written, written_beside
from ostro.weights.store import NO_HINTS, Hints, Reader, Shape, TensorInfo, Where, match_depth, match_shapes

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

WHAT = "a training checkpoint (a step-… folder, the checkpoints folder around it, or its run directory)"
WEIGHTS_PREFIX = "model."  # "model." + canonical name; the optimizer's tensors have other prefixes

_STATE = "state.json"
_METADATA = ".metadata"
_STEP = re.compile(r"step-(\d{8,18})")
_DAMAGED = "the checkpoint is damaged; take an earlier one"


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint of tensors and JSON state; it appears whole under its name or not at all.

    A whole checkpoint of that name is replaced. Raises OutOfMemory for a full disk, WeightsError for a place
    that cannot be written or holds something else.
    """
    _save(folder, tensors, state, replace=_is_whole(folder))


def _save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, replace: bool) -> None:
    import torch.distributed.checkpoint as torch_dcp

    text = json.dumps(state, indent=1)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values()) + len(text)
    with written_beside(folder, needed_bytes=num_bytes + (1 << 20), replace=replace) as partial:
        (partial / _STATE).write_text(text + "\n", "utf-8")
        with _quiet(lambda error: _not_saved(folder, error)):
            torch_dcp.save(dict(tensors), checkpoint_id=partial, no_dist=True)


def load(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors` in place and return the state.

    The checkpoint must hold exactly these names, shapes and dtypes: resuming is exact or it is an error.
    Raises WeightsError for that and for a folder that is not a whole, sound checkpoint.
    """
    state = read_state(folder)
    metadata = _read_metadata(folder)
    infos = _infos(metadata)
    match_shapes(
        str(folder),
        {name: info.shape for name, info in infos.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        "resume with the settings it was saved with",
    )
    for name, tensor in tensors.items():
        if tensor.dtype != infos[name].dtype:
            raise WeightsError(
                f"{folder} holds {name} as {infos[name].dtype}, the run has it as {tensor.dtype}: resume "
                "with the settings it was saved with."
            )
    _fill(folder, metadata, tensors)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint without touching its tensors."""
    if not _is_whole(folder):
        raise WeightsError(f"{folder} is not a whole checkpoint: it lacks {_STATE} or {_METADATA}; take another.")
    try:
        state = json.loads((folder / _STATE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{folder / _STATE} cannot be read ({error}): {_DAMAGED}.") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{folder / _STATE} is not a JSON object: {_DAMAGED}.")
    return state


def step_folder(directory: Path, step: int) -> Path:
    """Return where the checkpoint of a step belongs."""
    return directory / f"step-{step:08d}"


def latest(directory: Path) -> Path | None:
    """Return the newest whole checkpoint in a folder of them, or None."""
    found = _steps(directory)
    return found[max(found)] if found else None


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and what interrupted saves left behind."""
    found = _steps(directory)
    for step in sorted(found)[: max(0, len(found) - keep)]:
        # Out of sight first: a removal that is interrupted must not leave a checkpoint that looks whole.
        old = found[step].with_name(f"{found[step].name}.partial-old")
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(OSError):
            found[step].rename(old)
    for stale in directory.glob("step-*.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)


def find(path: Path) -> Path | None:
    """Return the checkpoint that a path stands for: itself, or the newest whole one of a run or folder."""
    return path if _is_whole(path) else latest(path) or latest(path / "checkpoints")


def _of_step(path: Path, step: int) -> Path:
    """Return the checkpoint of a step in a run directory or a folder of checkpoints."""
    found = _steps(path) | _steps(path / "checkpoints")
    if step not in found:
        raise WeightsError(
            f"{path} holds no whole checkpoint of step {step}; it has {', '.join(map(str, sorted(found))) or 'none'}: "
            "choose one of those."
        )
    return found[step]


class CheckpointReader:
    """The weights of a training checkpoint as a reader; WeightsError if it holds no sound model.

    A parameter is read as a whole, and the last one kept while its pieces are asked for: DCP's files have no
    slices.
    """

    format = "dcp"

    def __init__(self, path: Path, step: int | None = None) -> None:
        folder = find(path) if step is None else _of_step(path, step)
        if folder is None:
            raise WeightsError(
                f"{path} holds no whole training checkpoint: the run was interrupted before its first one; "
                "resume it or give another folder."
            )
        self.path = folder
        self.notes = (f"the checkpoint is {folder.name}",) if folder != path else ()
        fields = read_state(folder).get("model")
        if not isinstance(fields, dict):
            raise WeightsError(f"{folder / _STATE} does not say what model it is of: {_DAMAGED}.")
        try:
            self.model = ModelConfig.from_fields(fields)
        except (ConfigError, TypeError) as error:
            raise WeightsError(f"{folder / _STATE}: {error}") from error
        self._metadata = _read_metadata(folder)
        found = _infos(self._metadata)
        self._infos = {
            name.removeprefix(WEIGHTS_PREFIX): info for name, info in found.items() if name.startswith(WEIGHTS_PREFIX)
        }
        match_depth(str(folder), self._infos, self.model)
        table = layout.table(self.model)
        shapes: dict[str, Shape] = {name: info.shape for name, info in self._infos.items()}
        match_shapes(str(folder), shapes, {name: parameter.shape for name, parameter in table.items()})
        self._infos = {name: self._infos[name] for name in table}
        self._held: tuple[str, Tensor] | None = None

    def names(self) -> dict[str, TensorInfo]:
        """Return every tensor of the table, with the dtype it was trained in."""
        return self._infos

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Return a slice of a parameter."""
        if self._held is None or self._held[0] != name:
            self._held = None  # before the next is allocated: one parameter is held, never two
            tensor = torch.empty(self._infos[name].shape, dtype=self._infos[name].dtype)
            _fill(self.path, self._metadata, {WEIGHTS_PREFIX + name: tensor})
            self._held = name, tensor
        return self._held[1][where]


def detect(path: Path) -> bool:
    """Whether `path` looks like this format, whole or not."""
    around = (path, path / "checkpoints")
    return (path / _METADATA).exists() or any(any(folder.glob("step-*")) for folder in around)


def open_reader(path: Path, hints: Hints = NO_HINTS) -> CheckpointReader:
    """Open a checkpoint, a folder of them, or a run directory."""
    return CheckpointReader(path, hints.step)


def write(reader: Reader, path: Path) -> None:
    """Write the weights alone as a training checkpoint; the whole model is in memory while this runs."""
    tensors = {WEIGHTS_PREFIX + name: reader.read(name) for name in reader.names()}
    _save(path, tensors, {"model": reader.model.as_fields()}, replace=False)


def _is_whole(folder: Path) -> bool:
    is_final = ".partial-" not in folder.name
    return is_final and (folder / _STATE).is_file() and (folder / _METADATA).is_file()


def _steps(directory: Path) -> dict[int, Path]:
    if not directory.is_dir():
        return {}
    named = ((_STEP.fullmatch(path.name), path) for path in directory.iterdir())
    return {int(match[1]): path for match, path in named if match and _is_whole(path)}


def _fill(folder: Path, metadata: Metadata, tensors: Mapping[str, Tensor]) -> None:
    import torch.distributed.checkpoint as torch_dcp

    reader = torch_dcp.FileSystemReader(folder)
    # Its own would unpickle the file once more, without our allow-list. (Tensors it loads with weights_only.)
    reader.read_metadata = lambda *args, **kwargs: metadata
    with _quiet(lambda error: WeightsError(f"{folder} cannot be read ({_brief(error)}): {_DAMAGED}.")):
        torch_dcp.load(dict(tensors), storage_reader=reader, no_dist=True)


@contextlib.contextmanager
def _quiet(translate: Callable[[BaseException], Error]) -> Iterator[None]:
    """Run a call into DCP: without its warning about the one process, and with our error for its own."""
    from torch.distributed.checkpoint.api import CheckpointException

    # A CheckpointException is a BaseException and wraps even the user's interrupt.
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if not isinstance(cause, Exception):
                raise cause from None
        raise translate(causes[0] if causes else error) from error
    except Error:
        raise
    except Exception as error:
        raise translate(error) from error


def _not_saved(folder: Path, error: BaseException) -> Error:
    if isinstance(error, OSError):
        return not_written(folder, error)
    # torch.save's zip writer loses the system's error on the way; what it reports is that bytes are missing.
    if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error)):
        return OutOfMemory(
            f"{folder} could not be written whole and nothing of it was kept: its disk or quota is probably "
            "full; free some space or choose another disk."
        )
    return WeightsError(f"{folder} cannot be written ({_brief(error)}): choose another place.")


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _infos(metadata: Metadata) -> dict[str, TensorInfo]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    infos = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # _check_metadata
        infos[name] = TensorInfo(tuple(entry.size), entry.properties.dtype)
    return infos


def _read_metadata(folder: Path) -> Metadata:
    """Return DCP's metadata; WeightsError if it asks for any class but its own or does not fit the files."""
    path = folder / _METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        _check_metadata(metadata, folder)
    except WeightsError:
        raise
    except Exception as error:  # a pickle can raise anything
        raise WeightsError(f"{path} cannot be read ({_brief(error)}): {_DAMAGED}.") from error
    return metadata


def _check_metadata(metadata: Any, folder: Path) -> None:
    """Hold the metadata against the files; a wrong type in it raises any exception."""
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

    if not isinstance(metadata, Metadata):
        raise TypeError("it is not DCP's Metadata")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):  # DCP would unpickle it
            raise WeightsError(f"{folder} holds {name}, which is not a tensor: Ostro did not write it; take another.")
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise TypeError(f"{name} has no dtype")
        # DCP would leave what no chunk covers as it is, without a word.
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
            raise WeightsError(f"{folder} holds only a part of {name}: {_DAMAGED}.")
    sizes: dict[str, int] = {}
    for index, info in (metadata.storage_data or {}).items():
        file = info.relative_path
        if Path(file).name != file or info.transform_descriptors:
            raise WeightsError(f"{folder} keeps {index.fqn} in {file!r}: Ostro did not write it; take another.")
        if file not in sizes:
            sizes[file] = (folder / file).stat().st_size if (folder / file).is_file() else -1
        if sizes[file] < 0:
            raise WeightsError(f"{folder} lacks {file}, which holds {index.fqn}: {_DAMAGED}.")
        if info.offset + info.length > sizes[file]:
            raise WeightsError(
                f"{folder / file} is truncated: {index.fqn} ends at byte {info.offset + info.length}, the "
                f"file has {sizes[file]}; {_DAMAGED}."
            )
    metadata.storage_meta = StorageMeta()


_DCP_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_DCP_METADATA, "Metadata"),
    (_DCP_METADATA, "MetadataIndex"),
    (_DCP_METADATA, "StorageMeta"),
    (_DCP_METADATA, "TensorStorageMetadata"),
    (_DCP_METADATA, "BytesStorageMetadata"),
    (_DCP_METADATA, "ChunkStorageMetadata"),
    (_DCP_METADATA, "TensorProperties"),
    (_DCP_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata and nothing that acts; `pickle` asks for a subclass here."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed class, or raise WeightsError."""
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layouts().__getitem__
        if module.startswith("pathlib") and name == "PosixPath":
            return PurePosixPath  # where it was once written; it opens nothing
        if (module, name) == ("builtins", "getattr"):
            return _memory_format  # how Python 3.11.0 to 3.11.3 pickled an enum
        raise WeightsError(
            f"the checkpoint's {_METADATA} asks for {module}.{name}, which no checkpoint needs: it may be an "
            "attack; do not use the file."
        )


@functools.cache
def _layouts() -> dict[str, torch.layout]:
    return {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}


def _memory_format(kind: Any, name: str) -> Any:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    return _MEM_FORMAT_ENCODING[name]
