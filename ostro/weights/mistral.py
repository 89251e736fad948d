"""Mistral's own checkpoints: params.json beside consolidated.safetensors, or beside shards or pickles of that name.

Names and shapes are those of mistral-inference (its transformer.py, transformer_layers.py, moe.py), whose rotary
positions turn neighbouring rows of q and k. The first release of 8x7B (consolidated.00.pt … 07.pt) has each
layer's experts in one tensor, w2 transposed (transformers' convert_mixtral_weights_to_hf.py). Both are read,
the first is written.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ostro.errors import ConfigError, WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import hf
from ostro.weights.folder import written_beside
from ostro.weights.hf_config import SaveTokenizer, read_config, read_json, save_tokenizer, tokenizer_folder, write_json
from ostro.weights.identify import settle
from ostro.weights.mapped import TensorFile
from ostro.weights.pickle_file import SUFFIXES
from ostro.weights.reshard import Box, GatheredFile, Shard
from ostro.weights.safetensors_file import write_file
from ostro.weights.store import NO_HINTS, Hints, Reader, TensorInfo, architecture_difference, same_bits
from ostro.weights.stored import (
    AS_IT_IS,
    TRANSPOSED,
    Source,
    SourceOf,
    StoredReader,
    file_tensors,
    interleaved,
    streamed,
)

WHAT = "a Mistral checkpoint (params.json with consolidated.safetensors or consolidated.00.pth)"

_PARAMS = "params.json"
_SINGLE = "consolidated.safetensors"
_LAYERS = "layers."
_ADVICE = "the download is incomplete, or params.json belongs to another model"
_NAMES = {
    layout.EMBEDDING: "tok_embeddings.weight",
    layout.INPUT_NORM: "layers.{layer}.attention_norm.weight",
    layout.Q: "layers.{layer}.attention.wq.weight",
    layout.K: "layers.{layer}.attention.wk.weight",
    layout.V: "layers.{layer}.attention.wv.weight",
    layout.O: "layers.{layer}.attention.wo.weight",
    layout.POST_NORM: "layers.{layer}.ffn_norm.weight",
    layout.GATE: "layers.{layer}.feed_forward.gate.weight",
    layout.NORM: "norm.weight",
    layout.HEAD: "output.weight",
}
_HALVES = ("w1", "w3")  # of w13

# Files


def detect(path: Path) -> bool:
    """Whether `path` looks like this format, sound or not; a folder with Hugging Face's weights as well is theirs."""
    if path.is_file():
        return path.name.startswith("consolidated") and path.suffix in (".safetensors", *SUFFIXES)
    if any(path.glob("model*.safetensors*")) or any(path.glob("pytorch_model*.bin*")):
        return False
    return bool(_paths(path)) or ((path / _PARAMS).exists() and not (path / "config.json").exists())


def open_reader(path: Path, hints: Hints = NO_HINTS) -> StoredReader:
    """Open a folder, or one file that holds the whole model; `check` holds it against params.json."""
    folder = path if path.is_dir() else path.parent
    opened = [hf.open_file(file) for file in ([path] if path.is_file() else _paths(path))]
    if not opened:
        raise WeightsError(
            f"{path} has a {_PARAMS}, but no {_SINGLE} and no shards of it: the download is probably incomplete."
        )
    infos: dict[str, TensorInfo] = {}
    for file in opened:
        infos |= file.infos
    is_stacked = any(name.endswith(".block_sparse_moe.w1") for name in infos)
    source = _stacked_source if is_stacked else source_of
    held = None
    if (folder / _PARAMS).exists():
        held = read_params(folder / _PARAMS)
    elif (folder / "config.json").exists():
        held = read_config(folder / "config.json")
    model, notes = settle(path, hints.model, held, infos, source, _LAYERS)
    files = _merged(path, opened, model)
    return StoredReader("mistral", path, model, files, source(model), layers=_LAYERS, notes=notes, advice=_ADVICE)


def write(reader: Reader, path: Path, *, tokenizer: SaveTokenizer = None) -> Sequence[str]:
    """Write a folder that mistral-inference's `Transformer.from_folder` loads; it appears whole or not at all.

    All tensors are in one file: it opens no other. A tied head is written out, since it has none. The tensors keep
    their dtypes; it computes with weights of one dtype alone. `tokenizer` is a folder or a function that saves one
    into the folder it is given. Raises WeightsError for a target that is not empty, OutOfMemory for a full disk.
    """
    tensors = file_tensors(reader, source_of(reader.model))
    if reader.model.tie_word_embeddings:
        embedding = tensors[_NAMES[layout.EMBEDDING]]
        tensors[_NAMES[layout.HEAD]] = dataclasses.replace(embedding, name=_NAMES[layout.HEAD])
    infos = {name: tensor.info for name, tensor in tensors.items()}
    num_bytes = sum(info.num_bytes for info in infos.values())
    with written_beside(path, needed_bytes=num_bytes + (1 << 20)) as folder:
        _save_tokenizer(tokenizer, folder)
        write_json(folder / _PARAMS, params_of(reader.model))
        write_file(folder / _SINGLE, infos, streamed(tensors.values()))
    is_mixed = len({info.dtype for info in infos.values()}) > 1
    return ("its tensors are of several types, and mistral-inference computes with one",) if is_mixed else ()


def _paths(folder: Path) -> list[Path]:
    """Return the files that make up the model, in order; of several kinds those that mistral-inference would take."""
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    for pattern in ("consolidated*.safetensors", *(f"consolidated*{suffix}" for suffix in SUFFIXES)):
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def _save_tokenizer(tokenizer: SaveTokenizer, folder: Path) -> None:
    """Save a tokenizer with one file of pieces: mistral-inference refuses two, and reads the version off the name."""
    versioned = sorted(tokenizer.glob("tokenizer.model.v*")) if isinstance(tokenizer, Path) else []
    if not versioned or (isinstance(tokenizer, Path) and tokenizer_folder(tokenizer)):
        save_tokenizer(tokenizer, folder)
    pieces = folder / "tokenizer.model"
    if versioned:
        pieces.unlink(missing_ok=True)
        shutil.copyfile(versioned[-1], folder / versioned[-1].name)
    elif pieces.is_file() and b"[INST]" in pieces.read_bytes():
        pieces.rename(folder / "tokenizer.model.v3")  # 8x22B's; without a version it is taken for 8x7B's, v1


# Tensors


def source_of(model: ModelConfig) -> SourceOf:
    """Return where each piece of a model stands: matrices as in Hugging Face's files, rows of q and k in pairs."""
    order = {layout.Q: interleaved(model.head_dim), layout.K: interleaved(model.head_dim)}

    def source(parameter: layout.Parameter, stack: tuple[int, ...]) -> Source:
        shape = parameter.shape[len(stack) :]
        if not stack:
            name = _NAMES[parameter.kind].format(layer=parameter.layer)
            return Source(name, shape, order=order.get(parameter.kind, AS_IT_IS))
        weight = _HALVES[stack[1]] if parameter.kind is layout.W13 else "w2"
        return Source(f"layers.{parameter.layer}.feed_forward.experts.{stack[0]}.{weight}.weight", shape)

    return source


def _stacked_source(model: ModelConfig) -> SourceOf:
    """Return where each piece stands in the first release: experts below one another, all as [E·F, D]."""
    plain = source_of(model)
    split = (model.num_local_experts, model.intermediate_size, model.hidden_size)
    rows = (split[0] * split[1], split[2])

    def source(parameter: layout.Parameter, stack: tuple[int, ...]) -> Source:
        prefix = f"layers.{parameter.layer}.block_sparse_moe."
        if parameter.kind is layout.GATE:
            return Source(f"{prefix}gate.weight", parameter.shape)
        if parameter.kind is layout.W13:
            return Source(prefix + _HALVES[stack[1]], rows, stack[:1], split=split)
        if parameter.kind is layout.W2:
            return Source(f"{prefix}w2", rows, stack, split=split, order=TRANSPOSED)
        return plain(parameter, stack)

    return source


def _merged(path: Path, opened: Sequence[TensorFile], model: ModelConfig) -> dict[str, TensorFile]:
    """Return the file of every tensor; one that lies in several files is put together."""
    holders: dict[str, list[TensorFile]] = {}
    for file in opened:
        for name in file.infos:
            holders.setdefault(name, []).append(file)
    return {name: files[0] if len(files) == 1 else _joined(path, name, files, model) for name, files in holders.items()}


def _joined(path: Path, name: str, files: Sequence[TensorFile], model: ModelConfig) -> TensorFile:
    """Return a tensor cut as for tensor parallelism (Meta's llama, Mistral's ancestor): norms and router repeated,
    what adds up its parts (wo, w2) cut in columns, the rest in rows; WeightsError for parts that do not fit."""
    first = files[0].infos[name]
    if len(first.shape) < 2 or name.endswith("gate.weight"):
        if not all(same_bits(file.tensor(name), files[0].tensor(name)) for file in files):
            raise WeightsError(f"{path} holds {name} in {len(files)} files, not the same in all: {_ADVICE}.")
        return files[0]
    is_embedding = name == _NAMES[layout.EMBEDDING] and first.shape[1] != model.hidden_size
    dim = 1 if is_embedding or name.endswith(("attention.wo.weight", ".w2.weight")) else 0
    shards: list[Shard] = []
    end = 0
    for file in files:
        info = file.infos[name]
        offsets = tuple(end if d == dim else 0 for d in range(len(info.shape)))
        shards.append(Shard(Box(offsets, info.shape), functools.partial(file.tensor, name)))
        end += info.shape[dim] if len(info.shape) > dim else 0
        if _without(info, dim) != _without(first, dim):
            raise WeightsError(f"{path} holds {name} in {len(files)} files, in parts that do not fit: {_ADVICE}.")
    shape = tuple(end if d == dim else size for d, size in enumerate(first.shape))
    return GatheredFile(path, {name: TensorInfo(shape, first.dtype)}, {name: shards})


def _without(info: TensorInfo, dim: int) -> tuple[object, ...]:
    return (info.dtype, len(info.shape), *info.shape[:dim], *info.shape[dim + 1 :])


# params.json

_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
    # Ostro's own, where they are not the usual ones; mistral-inference and vLLM pass over what they do not know.
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_NEEDED = ("dim", "n_layers", "hidden_dim", "n_heads", "vocab_size")
_EXPERTS = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
_OTHER_EXPERTS = ("num_shared_experts", "first_k_dense_replace", "expert_hidden_dim", "num_expert_groups")
_FOREIGN = {
    "quantization": "the weights are quantised: take the unquantised checkpoint",
    "quantization_config": "the weights are quantised: take the unquantised checkpoint",
    "vision_encoder": "it sees pictures, and Ostro reads Mixtral",
    "multimodal": "it sees or hears, and Ostro reads Mixtral",
    "yarn": "its rotary positions are scaled, and Ostro has the plain ones",
    "llama_4_scaling": "its attention is scaled by position, and Ostro reads Mixtral",
    "kv_lora_rank": "it has latent attention, and Ostro reads Mixtral",
}


def read_params(path: Path) -> ModelConfig:
    """Return the architecture that a params.json describes; WeightsError where it is not a Mixtral.

    An absent rope_theta is a million, as in mistral-inference; keys that say nothing about Mixtral's arithmetic are
    passed over. The first release's file has Hugging Face's names, as its conversion script shows.
    """
    found = {key: value for key, value in read_json(path).items() if value is not None}
    _require_mixtral(path, found)
    moe = found.get("moe", found)
    missing = [key for key in _NEEDED if key not in found and _FIELDS[key] not in found]
    missing += [f"moe.{key}" for key, ours in _EXPERTS.items() if key not in moe and ours not in moe]
    if missing:
        raise WeightsError(f"{path} does not say {', '.join(missing)}: fetch it again, or give --model config.json.")
    fields: dict[str, Any] = {"num_key_value_heads": found.get("n_heads", found.get("num_attention_heads"))}
    for held, names in ((found, _FIELDS), (moe, _EXPERTS)):
        fields |= {ours: held[ours] for ours in names.values() if ours in held}
        fields |= {ours: held[key] for key, ours in names.items() if key in held}
    fields["sliding_window"] = _window(path, found)
    try:
        model = ModelConfig(**fields)
        return model if "max_position_embeddings" in fields else _with_known_length(model)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error


def params_of(model: ModelConfig) -> dict[str, Any]:
    """Return the params.json of a model, with the keys of mistral-inference's `TransformerArgs` first."""
    ours = model.as_fields()
    usual = ModelConfig().as_fields()
    fields = {key: ours[name] for key, name in _FIELDS.items() if key != "max_seq_len"}
    for key in ("tied_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        if fields[key] == usual[_FIELDS[key]]:
            del fields[key]
    if model.sliding_window is not None:
        fields["sliding_window"] = model.sliding_window
    return fields | {"moe": {key: ours[name] for key, name in _EXPERTS.items()}}


def _require_mixtral(path: Path, found: Mapping[str, Any]) -> None:
    """Raise WeightsError for what changes the arithmetic and is no setting of Ostro's model."""
    for key, reason in _FOREIGN.items():
        if found.get(key):
            raise WeightsError(f"{path} has {key}: {reason}.")
    kind, activation = found.get("model_type", "transformer"), found.get("activation", "silu")
    if kind not in ("transformer", "mixtral") or activation != "silu":
        raise WeightsError(f"{path} is of a {kind!r} with {activation!r}: Ostro reads Mixtral, which has 'silu'.")
    moe = found.get("moe")
    if moe is None and "num_local_experts" not in found:
        raise WeightsError(f"{path} has no moe: it is of a dense model, and Ostro reads Mixtral.")
    if moe is not None and not isinstance(moe, dict):
        raise WeightsError(f"{path} has moe={moe!r} where an object belongs: fetch it again.")
    for key in _OTHER_EXPERTS:
        if moe and moe.get(key):
            raise WeightsError(f"{path} has moe.{key}={moe[key]!r}: Mixtral's experts are all alike, in every layer.")


def _window(path: Path, found: Mapping[str, Any]) -> Any:
    """Return the sliding window, which may be text, or a list that must then be of one value."""
    window = found.get("sliding_window", found.get("_sliding_window"))
    if isinstance(window, list):
        if len({str(item) for item in window}) != 1:
            raise WeightsError(f"{path} has sliding_window={window}: Ostro has one window for all layers, or none.")
        window = window[0]
    is_number = isinstance(window, str) and window.isascii() and window.isdigit() and len(window) < 10
    return int(window) if is_number else window


def _with_known_length(model: ModelConfig) -> ModelConfig:
    """Return the model with the length of context that the preset it is has: the released files do not say it."""
    from ostro import config

    for name in config.preset_names():
        if architecture_difference(preset := config.preset(name), model) is None:
            return dataclasses.replace(model, max_position_embeddings=preset.max_position_embeddings)
    return model
