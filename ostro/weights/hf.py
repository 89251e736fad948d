"""Hugging Face folders: config.json beside model.safetensors, or beside shards and their index.

On disk the experts are separate (`block_sparse_moe.experts.3.w1.weight`, the names of transformers 4 that 5
still writes); a module of transformers 5 dumped as it is has them stacked (`mlp.experts.gate_up_proj`), and one
of Ostro's has them under its own names. All are read, the first is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.weights.folder import written_beside
from ostro.weights.hf_config import (
    SaveTokenizer,
    config_fields,
    generation_fields,
    read_config,
    read_json,
    save_tokenizer,
    write_json,
)
from ostro.weights.identify import settle
from ostro.weights.mapped import TensorFile
from ostro.weights.pickle_file import SUFFIXES, PickleFile
from ostro.weights.safetensors_file import SafetensorsFile, write_file
from ostro.weights.store import NO_HINTS, Hints, Reader, require_softmax
from ostro.weights.stored import FileTensor, Source, StoredReader, file_tensors, streamed

WHAT = "a Hugging Face checkpoint (config.json with model.safetensors or model.safetensors.index.json)"

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_INDEXES = (_INDEX, "pytorch_model.bin.index.json")
_SINGLES = (_SINGLE, "pytorch_model.bin")
_SUFFIXES = (".safetensors", *SUFFIXES)
_ADVICE = "the download is incomplete, or config.json belongs to another model"
_WEIGHT = {0: "w1", 1: "w3"}  # which half of w13 is which of their matrices


def source(parameter: layout.Parameter, stack: tuple[int, ...]) -> Source:
    """Return where a piece stands in a checkpoint with separate experts."""
    experts = parameter.name.rpartition(".")[0]
    shape = parameter.shape[len(stack) :]
    if parameter.kind is layout.W13:
        return Source(f"{experts}.{stack[0]}.{_WEIGHT[stack[1]]}.weight", shape)
    if parameter.kind is layout.W2:
        return Source(f"{experts}.{stack[0]}.w2.weight", shape)
    return Source(parameter.name, shape)


def _source_of_transformers_5(parameter: layout.Parameter, stack: tuple[int, ...]) -> Source:
    """Return where a piece stands in a dumped module of transformers 5: gate and up in one, experts stacked."""
    shape = parameter.shape
    name = parameter.name.replace(".block_sparse_moe.", ".mlp.")
    if parameter.kind is layout.W13:
        rows = (shape[0], 2 * shape[2], shape[3])
        return Source(name.removesuffix("w13") + "gate_up_proj", rows, stack, split=shape)
    if parameter.kind is layout.W2:
        return Source(name.removesuffix("w2") + "down_proj", shape, stack)
    return Source(name, shape)


def _source_of_ostro(parameter: layout.Parameter, stack: tuple[int, ...]) -> Source:
    """Return where a piece stands under the canonical names."""
    return Source(parameter.name, parameter.shape, stack)


def detect(path: Path) -> bool:
    """Whether `path` looks like this format, sound or not."""
    if path.is_dir():
        return any((path / name).exists() for name in ("config.json", *_SINGLES, *_INDEXES)) or bool(_weights(path))
    return path.suffix in _SUFFIXES


def open_reader(path: Path, hints: Hints = NO_HINTS) -> StoredReader:
    """Open a folder, or one file with or without a config.json beside it; `check` holds them against each other."""
    folder = path if path.is_dir() else path.parent
    files = {name: file for name, file in open_files(path).items() if not name.endswith(".inv_freq")}
    if any(".mlp.experts." in name for name in files):
        map = _source_of_transformers_5
    elif any(name.endswith(".experts.w13") for name in files):
        map = _source_of_ostro
    else:
        map = source
    held = read_config(folder / "config.json") if (folder / "config.json").is_file() else None
    infos = {name: file.infos[name] for name, file in files.items()}
    model, notes = settle(path, hints.model, held, infos, lambda config: map, "model.layers.")
    return StoredReader("hf", path, model, files, map, notes=notes, advice=_ADVICE)


def write(reader: Reader, path: Path, *, max_shard_bytes: int = 5_000_000_000, tokenizer: SaveTokenizer = None) -> None:
    """Write a folder that `MixtralForCausalLM.from_pretrained` loads; it appears whole or not at all.

    `tokenizer` is a folder whose tokenizer files are copied, or a function that saves one into the folder it is
    given. Raises WeightsError for a target that is not empty, OutOfMemory for a full disk.
    """
    require_softmax(reader.model, "hf")
    tensors = file_tensors(reader, source)
    shards = _shards(tensors, max_shard_bytes)
    num_bytes = sum(tensor.info.num_bytes for tensor in tensors.values())
    with written_beside(path, needed_bytes=num_bytes + (1 << 20)) as folder:
        save_tokenizer(tokenizer, folder)
        write_json(folder / "config.json", config_fields(reader.model, reader.names()[layout.EMBEDDING.name].dtype))
        write_json(folder / "generation_config.json", generation_fields(reader.model))
        parts = streamed(tensors.values())
        for file, names in shards.items():
            write_file(folder / file, {name: tensors[name].info for name in names}, parts)
        if len(shards) > 1:
            metadata = {"total_parameters": layout.num_parameters(reader.model), "total_size": num_bytes}
            weight_map = {name: file for file, names in shards.items() for name in names}
            write_json(folder / _INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _shards(tensors: Mapping[str, FileTensor], max_shard_bytes: int) -> dict[str, list[str]]:
    """Return file names with their tensors; a tensor larger than a shard gets one of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.info.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.info.num_bytes
    if len(groups) == 1:
        return {_SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def open_file(path: Path) -> TensorFile:
    """Open a .safetensors file, or one of PyTorch's."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def open_files(path: Path) -> dict[str, TensorFile]:
    """Return the file of every tensor."""
    if path.is_file():
        file = open_file(path)
        return dict.fromkeys(file.infos, file)
    for name in _SINGLES:
        if (path / name).exists():
            return open_files(path / name)
    for name in _INDEXES:
        if (path / name).exists():
            return _open_shards(path / name)
    others = _weights(path)
    if len(others) == 1:
        return open_files(others[0])
    instead = (
        f"; it holds {len(others)} other files of tensors, first {others[0].name}: add their index"
        if others
        else ": the download is probably incomplete"
    )
    raise WeightsError(f"{path} has a config.json but neither {_SINGLE} nor {_INDEX}{instead}.")


def _weights(path: Path) -> list[Path]:
    return sorted(file for suffix in _SUFFIXES for file in path.glob(f"*{suffix}") if file.name != "training_args.bin")


def _open_shards(index: Path) -> dict[str, TensorFile]:
    path = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map: fetch or write it again.")
    for name, file in weight_map.items():
        if not name.isprintable():
            raise WeightsError(f"{index} names a tensor {name!r}: fetch or write it again.")
        if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
            raise WeightsError(f"{index} puts {name} into {file!r}: a file name in the same folder belongs there.")
    absent = [name for name, file in weight_map.items() if not (path / file).is_file()]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        raise WeightsError(
            f"{index} names {len(weight_map)} tensors; {len(absent)} {verb} missing, first {absent[0]} in "
            f"{weight_map[absent[0]]}: the download is probably incomplete."
        )
    files = {file: open_file(path / file) for file in dict.fromkeys(weight_map.values())}
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
