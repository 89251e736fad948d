"""Hugging Face folders: config.json beside model.safetensors, or beside shards and their index.

On disk the experts are separate (`block_sparse_moe.experts.3.w1.weight`, the names of transformers 4 that 5
still writes); a module of transformers 5 dumped as it is has them stacked (`mlp.experts.gate_up_proj`). Both
are read, the first is written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.weights.folder import written_beside
from ostro.weights.hf_config import config_fields, generation_fields, read_config, read_json
from ostro.weights.safetensors_file import SafetensorsFile, write_file
from ostro.weights.store import (
    Reader,
    Shape,
    TensorInfo,
    Where,
    assemble,
    cast,
    label,
    match_depth,
    match_shapes,
    pieces,
    same_bits,
)

WHAT = "a Hugging Face checkpoint (config.json with model.safetensors or model.safetensors.index.json)"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ADVICE = "the download is incomplete, or config.json belongs to another model"
_WEIGHT = {0: "w1", 1: "w3"}  # which half of w13 is which of their matrices


class HfReader:
    """A folder, or one .safetensors file with a config.json beside it, as a reader.

    Raises WeightsError for whatever is missing, left over, truncated, renamed or at odds with config.json.
    """

    format = "hf"

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else path.parent
        if not (folder / "config.json").is_file():
            raise WeightsError(f"{folder} has no config.json: put the model's own beside its weights.")
        self.path = path
        self.model = read_config(folder / "config.json")
        self._files = _open_files(path)
        self._is_stacked = any(".mlp.experts." in name for name in self._files)
        self._check()

    def names(self) -> dict[str, TensorInfo]:
        """Return every tensor of the table, with the dtype it has on disk."""
        return {p.name: TensorInfo(p.shape, self._dtype(p)) for p in layout.parameters(self.model)}

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Return a slice: views of the mapped file, copied only where experts have to be stacked."""
        parameter = self._table[name]
        sizes, source = _stacking(parameter, self._is_stacked)

        def piece(stack: tuple[int, ...], rest: Where) -> Tensor:
            held = self._tensor(source(stack))
            return (held if sizes else held.view(parameter.shape))[rest]

        return assemble(sizes, where, piece)

    def _tensor(self, name: str) -> Tensor:
        return self._files[name].tensor(name)

    def _dtype(self, parameter: layout.Parameter) -> torch.dtype:
        sizes, source = _stacking(parameter, self._is_stacked)
        first = source((0,) * len(sizes))
        return self._files[first].infos[first].dtype

    def _check(self) -> None:
        """Hold the files against config.json."""
        held = {name: file.infos[name] for name, file in self._files.items() if not name.endswith(".inv_freq")}
        match_depth(str(self.path), held, self.model)
        self._match_experts(held)
        self._table = layout.table(self.model)
        wanted: dict[str, Shape] = {}
        for parameter in self._table.values():
            names = dict(_on_disk(parameter, self._is_stacked))
            wanted |= names
            found = {held[name].dtype for name in names if name in held}
            if not found <= set(_FLOATS) or len(found) > 1:
                words = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
                raise WeightsError(
                    f"{self.path} holds {parameter.name} as {words}: every tensor must have one floating-point type."
                )
        if self.model.tie_word_embeddings and layout.HEAD.name in held:
            self._check_tied(held)
        match_shapes(str(self.path), {name: info.shape for name, info in held.items()}, wanted, _ADVICE)

    def _match_experts(self, held: dict[str, TensorInfo]) -> None:
        """Compare the number of experts first: with an absurd one the table of names would be endless."""
        for name, info in held.items():
            is_gate = name.endswith((".block_sparse_moe.gate.weight", ".mlp.gate.weight"))
            if is_gate and info.shape[:1] != (self.model.num_local_experts,):
                raise WeightsError(
                    f"config.json of {self.path} says num_local_experts={self.model.num_local_experts}, "
                    f"{name} has the shape {'×'.join(map(str, info.shape))}: the configuration belongs to "
                    "another model."
                )

    def _check_tied(self, held: dict[str, TensorInfo]) -> None:
        """Let a tied model bring its head along, as some do, if it is the embedding indeed."""
        head, embedding = layout.HEAD.name, layout.EMBEDDING.name
        held.pop(head)
        if embedding in held and not same_bits(self._tensor(head), self._tensor(embedding)):
            raise WeightsError(
                f"{self.path} holds a {head} that differs from {embedding}, but its config.json ties the "
                "two: set tie_word_embeddings to false."
            )


def detect(path: Path) -> bool:
    """Whether `path` looks like this format, sound or not."""
    if path.is_dir():
        return any((path / name).exists() for name in ("config.json", _SINGLE, _INDEX))
    return path.suffix == ".safetensors"


def open_reader(path: Path) -> HfReader:
    """Open a folder or a single file."""
    return HfReader(path)


def tokenizer_folder(path: Path) -> Path | None:
    """Return the folder of a checkpoint if tokenizer files lie in it."""
    folder = path if path.is_dir() else path.parent
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def write(
    reader: Reader,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: Path | Callable[[Path], None] | None = None,
) -> None:
    """Write a folder that `MixtralForCausalLM.from_pretrained` loads; it appears whole or not at all.

    `dtype` None keeps each tensor's own. `tokenizer` is a folder whose tokenizer files are copied, or a
    function that saves one into the folder it is given. Raises WeightsError for a target that is not empty
    and for values that `dtype` cannot hold, OutOfMemory for a full disk.
    """
    entries = {entry.name: entry for entry in _entries(reader, dtype)}
    shards = _shards(entries, max_shard_bytes)
    num_bytes = sum(entry.info.num_bytes for entry in entries.values())

    def tensor(name: str) -> Tensor:
        entry = entries[name]
        value = reader.read(entry.parameter.name, entry.where)
        return cast(value, entry.info.dtype, label(entry.parameter.name, entry.where))

    with written_beside(path, needed_bytes=num_bytes + (1 << 20)) as folder:
        if tokenizer is not None:
            _save_tokenizer(tokenizer, folder)
        word = str(entries[layout.EMBEDDING.name].info.dtype).removeprefix("torch.")
        _write_json(folder / "config.json", config_fields(reader.model, word))
        _write_json(folder / "generation_config.json", generation_fields(reader.model))
        for file, names in shards.items():
            write_file(folder / file, {name: entries[name].info for name in names}, tensor)
        if len(shards) > 1:
            metadata = {"total_parameters": layout.num_parameters(reader.model), "total_size": num_bytes}
            weight_map = {name: file for file, names in shards.items() for name in names}
            _write_json(folder / _INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of the file, and the piece of a canonical one that it is."""

    name: str
    parameter: layout.Parameter
    where: Where
    info: TensorInfo


def _entries(reader: Reader, dtype: torch.dtype | None) -> Iterator[_Entry]:
    """Yield the tensors to write, in the order they are written."""
    infos = reader.names()
    for parameter in layout.parameters(reader.model):
        for where, (name, shape) in zip(pieces(parameter), _on_disk(parameter, False), strict=True):
            info = TensorInfo(shape, dtype or infos[parameter.name].dtype)
            yield _Entry(name, parameter, where, info)


def _shards(entries: dict[str, _Entry], max_shard_bytes: int) -> dict[str, list[str]]:
    """Return file names with their tensors; a tensor larger than a shard gets one of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        if groups[-1] and filled + entry.info.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += entry.info.num_bytes
    if len(groups) == 1:
        return {_SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _save_tokenizer(tokenizer: Path | Callable[[Path], None], folder: Path) -> None:
    if callable(tokenizer):
        tokenizer(folder)
        return
    found = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not found:
        raise WeightsError(f"{tokenizer} holds no tokenizer file: give the folder that has tokenizer.json.")
    for file in found:
        shutil.copyfile(file, folder / file.name)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _stacking(parameter: layout.Parameter, is_stacked: bool) -> tuple[Shape, Callable[[tuple[int, ...]], str]]:
    """Return the leading dims that are separate tensors on disk, and the name of one of those tensors."""
    name = parameter.name
    if parameter.kind not in (layout.W13, layout.W2, layout.GATE):
        return (), lambda stack: name
    if is_stacked:
        theirs = name.replace(".block_sparse_moe.", ".mlp.")
        theirs = theirs.removesuffix("w13") + "gate_up_proj" if parameter.kind is layout.W13 else theirs
        theirs = theirs.removesuffix("w2") + "down_proj" if parameter.kind is layout.W2 else theirs
        return (), lambda stack: theirs
    experts = name.rpartition(".")[0]
    if parameter.kind is layout.W13:
        return parameter.shape[:2], lambda stack: f"{experts}.{stack[0]}.{_WEIGHT[stack[1]]}.weight"
    if parameter.kind is layout.W2:
        return parameter.shape[:1], lambda stack: f"{experts}.{stack[0]}.w2.weight"
    return (), lambda stack: name


def _on_disk(parameter: layout.Parameter, is_stacked: bool) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of the tensors on disk that make up a parameter, in the order of `pieces`."""
    sizes, source = _stacking(parameter, is_stacked)
    shape = parameter.shape
    if is_stacked and parameter.kind is layout.W13:
        yield source(()), (shape[0], 2 * shape[2], shape[3])
    elif not sizes:
        yield source(()), shape
    else:
        for stack in product(*map(range, sizes)):
            yield source(stack), shape[len(stack) :]


def _open_files(path: Path) -> dict[str, SafetensorsFile]:
    """Return the file of every tensor."""
    if path.is_file():
        file = SafetensorsFile(path)
    elif (path / _SINGLE).exists():
        file = SafetensorsFile(path / _SINGLE)
    elif (path / _INDEX).exists():
        return _open_shards(path)
    else:
        raise WeightsError(f"{path} has a config.json but neither {_SINGLE} nor {_INDEX}{_instead(path)}.")
    return dict.fromkeys(file.infos, file)


def _instead(path: Path) -> str:
    others = sorted(file.name for file in path.glob("*.safetensors"))
    pickles = sorted(file.name for file in path.glob("*.bin"))
    if len(others) == 1:
        return f"; it holds {others[0]}: give that file itself, or rename it to {_SINGLE}"
    if others:
        return f"; it holds {len(others)} other .safetensors files, first {others[0]}: add their index"
    if pickles:
        return f"; it holds {pickles[0]}, a pickle, which Ostro never loads: save it as safetensors"
    return ": the download is probably incomplete"


def _open_shards(path: Path) -> dict[str, SafetensorsFile]:
    index = path / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map: fetch or write it again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise WeightsError(f"{index} puts {name} into {file!r}: a file name in the same folder belongs there.")
    absent = [name for name, file in weight_map.items() if not (path / file).is_file()]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        raise WeightsError(
            f"{index} names {len(weight_map)} tensors; {len(absent)} {verb} missing, first {absent[0]} in "
            f"{weight_map[absent[0]]}: the download is probably incomplete."
        )
    files = {file: SafetensorsFile(path / file) for file in dict.fromkeys(weight_map.values())}
    strays = [name for name, file in weight_map.items() if name not in files[file].infos]
    if strays:
        raise WeightsError(
            f"{index} puts {len(strays)} of {len(weight_map)} tensors into files that do not hold them, "
            f"first {strays[0]} into {weight_map[strays[0]]}: the files were renamed or belong to another "
            "checkpoint."
        )
    return {name: files[file] for name, file in weight_map.items()} | {
        name: file for file in files.values() for name in file.infos if name not in weight_map
    }
