"""GGUF, llama.cpp's format: one file that holds weights, configuration and vocabulary.

To llama.cpp a Mixtral is a `llama` that has experts; names, keys and orders are those its convert_hf_to_gguf.py
writes. Norms and router are float32 there whatever the rest is. What the format has no place for (the dtype those
had, a sliding window, the last digits of a float) stands under keys of Ostro's own, which llama.cpp ignores.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ostro.errors import ConfigError, WeightsError, nearest
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights.folder import written_beside
from ostro.weights.gguf_file import (
    BF16,
    F16,
    F32,
    KINDS,
    MAGIC,
    GgufFile,
    Kind,
    Stored,
    Value,
    dequantize,
    encode,
    package,
    write_file,
)
from ostro.weights.gguf_vocabulary import add_vocabulary, vocabulary_of
from ostro.weights.hf_config import SaveTokenizer
from ostro.weights.store import NO_HINTS, Hints, Reader, TensorInfo, Where, cast
from ostro.weights.stored import (
    AS_IT_IS,
    FileTensor,
    Source,
    SourceOf,
    StoredReader,
    file_tensors,
    interleaved,
    streamed,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter

WHAT = "a GGUF file (model.gguf)"
SUFFIX = ".gguf"

_SINGLE = "model.gguf"
_ARCHITECTURE = "llama"
_CONFIG, _DTYPES = "ostro.config", "ostro.dtypes"
_ADVICE = "the file is incomplete, or of another kind of model"
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_OLD_EXPERT = re.compile(r"blk\.\d+\.ffn_(?:gate|up|down)\.\d+\.weight")  # llama.cpp before April 2024
_NAMES = {
    layout.EMBEDDING: "token_embd.weight",
    layout.INPUT_NORM: "blk.{layer}.attn_norm.weight",
    layout.Q: "blk.{layer}.attn_q.weight",
    layout.K: "blk.{layer}.attn_k.weight",
    layout.V: "blk.{layer}.attn_v.weight",
    layout.O: "blk.{layer}.attn_output.weight",
    layout.POST_NORM: "blk.{layer}.ffn_norm.weight",
    layout.GATE: "blk.{layer}.ffn_gate_inp.weight",
    layout.W2: "blk.{layer}.ffn_down_exps.weight",
    layout.NORM: "output_norm.weight",
    layout.HEAD: "output.weight",
}
_HALVES = ("blk.{layer}.ffn_gate_exps.weight", "blk.{layer}.ffn_up_exps.weight")
_NARROW = (torch.bfloat16, torch.float16)
_READ_ROWS = 256
_CHUNK_VALUES = 1 << 20  # encoded at a time: what fits into a cache is quantised twice as fast
# ModelConfig's fields, and where they stand behind "llama.".
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_MAY_LACK = ("num_key_value_heads", "head_dim", "rope_theta")
# Keys that, with any other value, make the same weights compute something that Ostro does not.
_PLAIN: dict[str, tuple[Value, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_shared_count": (0,),
}


def detect(path: Path) -> bool:
    """Whether `path` looks like this format, sound or not."""
    if path.is_dir():
        return any(path.glob(f"*{SUFFIX}"))
    if path.suffix == SUFFIX:
        return True
    with contextlib.suppress(OSError), path.open("rb") as file:  # Ollama's blobs have no suffix
        return file.read(len(MAGIC)) == MAGIC
    return False


def open_reader(path: Path, hints: Hints = NO_HINTS) -> StoredReader:
    """Open a file, all files of a split model, or the folder that holds one model.

    Quantised tensors are presented as float32. Raises WeightsError for another architecture, for settings that
    Ostro's model does not have, and for files of a split model that are missing or do not belong together.
    """
    parts = [GgufFile(file) for file in _files_of(path)]
    _require_whole(path, parts)
    stored = {name: held for part in parts for name, held in part.stored.items()}
    model = _read_config(parts[0], stored)
    dtypes = _recorded_dtypes(parts[0], stored)
    files = {name: file for part in parts for file in [_Narrowed(part, dtypes)] for name in file.infos}
    source = source_of(model, separate_experts=any(_OLD_EXPERT.fullmatch(name) for name in stored))
    words = sorted({held.kind.word for held in stored.values() if held.kind.is_quantized})
    notes = [f"{' and '.join(words)} weights are read as float32"] if words else []
    return StoredReader("gguf", path, model, files, source, layers="blk.", notes=notes, advice=_ADVICE)


def source_of(model: ModelConfig, *, separate_experts: bool = False) -> SourceOf:
    """Return where a model's pieces stand; rotary rows are in pairs, experts stacked or (formerly) separate."""
    rotary = interleaved(model.head_dim)

    def source(parameter: layout.Parameter, stack: tuple[int, ...]) -> Source:
        kind, shape = parameter.kind, parameter.shape
        pattern = _HALVES[stack[1]] if kind is layout.W13 else _NAMES[kind]
        name = pattern.format(layer=parameter.layer)
        if kind not in (layout.W13, layout.W2):
            return Source(name, shape, order=rotary if kind in (layout.Q, layout.K) else AS_IT_IS)
        if separate_experts:
            return Source(name.replace("_exps.", f".{stack[0]}."), shape[len(stack) :])
        return Source(name, (shape[0], *shape[-2:]), stack[:1])

    return source


def write(
    reader: Reader, path: Path, *, quantization: str | None = None, tokenizer: SaveTokenizer = None
) -> tuple[str, ...]:
    """Write a file that llama.cpp loads, or a folder with `model.gguf`; it appears whole or not at all.

    `quantization` is how matrices are stored: f32, bf16, f16, q8_0 or q4_0; None keeps each one's own dtype. A
    matrix whose rows are no multiple of 32 values is f16 instead of quantised, as in llama.cpp's own conversion.
    `tokenizer` is a folder, or a function that saves one into the folder it is given; of its files,
    tokenizer.model is used. Returns sentences on what llama.cpp gets otherwise than the model has it. Raises
    WeightsError for a target that exists and values a type cannot hold, OutOfMemory for a full disk.
    """
    package()  # before anything is prepared
    asked = _kind_named(quantization)
    model = reader.model
    source = source_of(model)
    tensors = file_tensors(reader, source)
    stored = {name: Stored(tensor.info.shape, _stored_kind(tensor, asked)) for name, tensor in tensors.items()}
    vocabulary, notes = vocabulary_of(tokenizer, model)
    notes += _notes(model, asked, stored)
    dtypes = {
        name: str(tensor.info.dtype).removeprefix("torch.")
        for name, tensor in tensors.items()
        if stored[name].kind is F32 and tensor.info.dtype in _NARROW
    }
    file_type = asked or stored[_NAMES[layout.EMBEDDING]].kind

    def describe(writer: GGUFWriter) -> None:
        _add_config(writer, model, file_type, dtypes)
        add_vocabulary(writer, model, vocabulary)

    parts = streamed(tensors.values())

    def encoded(name: str) -> Iterator[Tensor]:
        what = f"{tensors[name].pieces[0].name} ({name})"
        for part in parts(name):
            for rows in part.split(max(1, _CHUNK_VALUES // part.shape[-1])):
                yield encode(rows, stored[name].kind, what)

    num_bytes = sum(kind.num_bytes(shape) for shape, kind in stored.values())
    is_file = path.suffix == SUFFIX
    with written_beside(path, needed_bytes=num_bytes + (1 << 24), is_file=is_file) as place:
        write_file(place if is_file else place / _SINGLE, _ARCHITECTURE, describe, stored, encoded)
    return tuple(notes)


def as_stored(reader: Reader, quantization: str | None) -> Reader:
    """Return the reader that a file written with this quantization opens as: what it loses is lost here too."""
    return _AsStored(reader, _kind_named(quantization))


class _AsStored:
    """A model's tensors after a way through a file; whole pieces only."""

    format = "gguf"

    def __init__(self, source: Reader, asked: Kind | None) -> None:
        self.model, self.notes, self._source = source.model, source.notes, source
        self._kinds = {
            piece.name: _stored_kind(tensor, asked)
            for tensor in file_tensors(source, source_of(source.model)).values()
            for piece in tensor.pieces
        }

    def names(self) -> dict[str, TensorInfo]:
        """Return every tensor with the dtype that reading presents."""
        infos = self._source.names()
        return {name: TensorInfo(info.shape, self._dtype(name, info.dtype)) for name, info in infos.items()}

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Return a piece as it comes back."""
        value, kind = self._source.read(name, where), self._kinds[name]
        if kind.is_quantized:
            out = torch.empty(value.shape)
            for rows, found in zip(value.split(_READ_ROWS), out.split(_READ_ROWS), strict=True):
                found.copy_(dequantize(encode(rows, kind, name), kind))
            return out
        return cast(value, self._dtype(name, value.dtype), name)

    def _dtype(self, name: str, own: torch.dtype) -> torch.dtype:
        kind = self._kinds[name]
        if kind.is_quantized:
            return torch.float32
        # What is F32 in the file comes back as the narrower type that it was.
        return own if kind is F32 and own in _NARROW else kind.dtype


def _kind_named(quantization: str | None) -> Kind | None:
    if quantization is None:
        return None
    kind = KINDS.get(quantization.upper())
    if kind is None:
        known = [word.lower() for word in KINDS]
        raise ConfigError(
            f"quantization {quantization!r} is not one of {', '.join(known)}.{nearest(quantization.lower(), known)}"
        )
    return kind


def _stored_kind(tensor: FileTensor, asked: Kind | None) -> Kind:
    """Return the type a tensor is stored as."""
    name, info = tensor.name, tensor.info
    own = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}.get(info.dtype)
    if own is None and asked is None:
        word = str(info.dtype).removeprefix("torch.")
        raise WeightsError(f"{tensor.pieces[0].name} is {word}, which llama.cpp does not compute with: ask for fp32.")
    if len(info.shape) == 1 or name.endswith(".ffn_gate_inp.weight"):
        return F32
    kind = asked or own or F32
    return kind if kind.fits(info.shape) else F16


def _notes(model: ModelConfig, asked: Kind | None, stored: Mapping[str, Stored]) -> list[str]:
    notes = []
    if asked is not None and asked.is_quantized:
        odd = [name for name, held in stored.items() if held.kind is F16]
        if odd:
            notes.append(
                f"{len(odd)} of {len(stored)} tensors are F16 instead of {asked.word}, first {odd[0]}: "
                "their rows are no multiple of 32"
            )
    if model.sliding_window is not None and model.sliding_window < model.max_position_embeddings:
        notes.append(
            f"llama.cpp ignores the sliding window of {model.sliding_window}: answers differ beyond as many tokens"
        )
    return notes


def _add_config(writer: GGUFWriter, model: ModelConfig, kind: Kind, dtypes: Mapping[str, str]) -> None:
    """Add what describes the model."""
    gguf = package()
    word = "ALL_F32" if kind is F32 else f"MOSTLY_{kind.word}"
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[word])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for field, key in _KEYS.items():
        value = getattr(model, field)
        add = writer.add_float32 if field in ("rope_theta", "rms_norm_eps") else writer.add_uint32
        add(f"{_ARCHITECTURE}.{key}", value)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_vocab_size(model.vocab_size)
    extra = ("rope_theta", "rms_norm_eps", "initializer_range", "sliding_window", "tie_word_embeddings")
    writer.add_string(_CONFIG, json.dumps({field: getattr(model, field) for field in extra}))
    if dtypes:
        writer.add_string(_DTYPES, json.dumps(dtypes))


class _Narrowed:
    """A file some of whose tensors are float32 and were of a narrower dtype before, as which they are presented."""

    def __init__(self, file: GgufFile, dtypes: Mapping[str, torch.dtype]) -> None:
        self.path = file.path
        self.infos = {name: TensorInfo(i.shape, dtypes.get(name, i.dtype)) for name, i in file.infos.items()}
        self._file = file

    def tensor(self, name: str, where: Where = ()) -> Tensor:
        """Return a tensor or a slice of it; WeightsError where the narrower dtype would lose a bit."""
        held, dtype = self._file.tensor(name, where), self.infos[name].dtype
        if held.dtype == dtype:
            return held
        bits = held.contiguous().view(torch.int32)
        if dtype == torch.bfloat16:  # its bits are the upper half, those of a NaN included
            narrow, is_exact = (bits >> 16).to(torch.int16).view(torch.bfloat16), not bool((bits & 0xFFFF).any())
        else:
            narrow = held.to(dtype)
            is_exact = torch.equal(narrow.float().view(torch.int32), bits)
        if not is_exact:
            word = str(dtype).removeprefix("torch.")
            raise WeightsError(
                f"{self.path} holds values in {name} that are no {word}, which it says they were "
                f"({_DTYPES}): they were changed since; remove that key from the file."
            )
        return narrow


def _files_of(path: Path) -> list[Path]:
    """Return the file, or all files of a split model in their order."""
    if path.is_dir():
        heads = [file for file in sorted(path.glob(f"*{SUFFIX}")) if _split_number(file) in (None, 1)]
        if len(heads) != 1:
            listed = ", ".join(file.name for file in heads[:3]) if heads else "no first part among its .gguf files"
            raise WeightsError(f"{path} holds {len(heads)} GGUF models ({listed}): give the file itself.")
        return _files_of(heads[0])
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    files = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}{SUFFIX}") for i in range(1, count + 1)]
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        verb = "is" if len(absent) == 1 else "are"
        first = f", first {absent[0]}" if absent else ""
        raise WeightsError(f"{path} is one of {count} files; {len(absent)} {verb} missing{first}: fetch all of them.")
    return files


def _split_number(file: Path) -> int | None:
    match = _SPLIT.fullmatch(file.name)
    return int(match[2]) if match else None


def _require_whole(path: Path, parts: Sequence[GgufFile]) -> None:
    """Raise WeightsError unless the files are those, and in the order, that their metadata says."""
    for at, part in enumerate(parts):
        count, number = part.metadata.get("split.count", 1), part.metadata.get("split.no", 0)
        if (count, number) != (len(parts), at) and not (len(parts) == 1 and count == 0):
            raise WeightsError(
                f"{part.path} says it is part {number} of {count} (from 0), its name says {at} of {len(parts)}: "
                "give the files their own names and keep them in one folder."
            )
    names = [name for part in parts for name in part.infos]
    held = len(names)
    if len(set(names)) != held:
        twice = next(name for name in names if names.count(name) > 1)
        raise WeightsError(f"two files of {path} hold {twice}: {_ADVICE}.")
    wanted = parts[0].metadata.get("split.tensors.count", held)
    if wanted != held:
        raise WeightsError(f"{path} holds {held} tensors in {len(parts)} files, {wanted} are announced: {_ADVICE}.")


def _read_config(file: GgufFile, stored: Mapping[str, Stored]) -> ModelConfig:
    """Return the architecture that the metadata describes."""
    path, metadata = file.path, file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != _ARCHITECTURE or not metadata.get(f"{_ARCHITECTURE}.expert_count"):
        raise WeightsError(
            f"{path} is of architecture {architecture!r} with {metadata.get(f'{architecture}.expert_count', 0)} "
            "experts; Ostro reads Mixtral, a 'llama' with experts."
        )
    for key, plain in _PLAIN.items():
        value = metadata.get(f"{_ARCHITECTURE}.{key}", plain[0])
        if value not in plain:
            raise WeightsError(f"{path} has {_ARCHITECTURE}.{key}={value!r}: Ostro's Mixtral has {plain[-1]!r} alone.")
    for name in (_NAMES[layout.EMBEDDING], _NAMES[layout.GATE].format(layer=0)):
        if name not in stored or len(stored[name].shape) != 2:
            raise WeightsError(f"{path} has no matrix {name}: {_ADVICE}.")
    fields = _described(file)
    fields.setdefault("head_dim", 0)
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("rope_theta", 10000.0)
    fields["vocab_size"] = metadata.get(f"{_ARCHITECTURE}.vocab_size", stored[_NAMES[layout.EMBEDDING]].shape[0])
    fields["tie_word_embeddings"] = _NAMES[layout.HEAD] not in stored
    for role, word in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{word}_token_id")
        if value is not None:
            fields[f"{role}_token_id"] = value
    fields |= _recorded_fields(file, fields)
    try:
        model = ModelConfig(**fields)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error
    for key in ("rope.dimension_count", "attention.value_length"):
        value = metadata.get(f"{_ARCHITECTURE}.{key}", model.head_dim)
        if value != model.head_dim:
            raise WeightsError(f"{path} has {_ARCHITECTURE}.{key}={value!r} and heads of {model.head_dim}: {_ADVICE}.")
    return model


def _described(file: GgufFile) -> dict[str, Any]:
    """Return the fields that stand under keys of llama.cpp's."""
    fields: dict[str, Any] = {}
    lists = file.lists()
    for field, suffix in _KEYS.items():
        key = f"{_ARCHITECTURE}.{suffix}"
        if key in lists:
            raise WeightsError(f"{file.path} has one {key} a layer: Ostro's layers are alike.")
        if key in file.metadata:
            fields[field] = file.metadata[key]
        elif field not in _MAY_LACK:
            raise WeightsError(f"{file.path} lacks the key {key}: {_ADVICE}.")
    return fields


def _recorded_fields(file: GgufFile, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that stand under our own key; a float only where it is what llama.cpp's key rounds."""
    recorded = _json_object(file, _CONFIG)
    kept = ("initializer_range", "sliding_window", "tie_word_embeddings")
    fields = {name: recorded[name] for name in kept if name in recorded}
    for name in ("rope_theta", "rms_norm_eps"):
        value, rounded = recorded.get(name), described[name]
        if isinstance(value, float) and isinstance(rounded, float) and abs(value - rounded) <= 1e-6 * abs(value):
            fields[name] = value
    return fields


def _recorded_dtypes(file: GgufFile, stored: Mapping[str, Stored]) -> dict[str, torch.dtype]:
    """Return the dtypes that tensors stored as float32 had."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    found: dict[str, torch.dtype] = {}
    for name, word in _json_object(file, _DTYPES).items():
        if word not in known or name not in stored:
            raise WeightsError(f"{file.path} records a {name} that was {word!r} in {_DTYPES}: write the file again.")
        if stored[name].kind is F32:
            found[name] = known[word]
    return found


def _json_object(file: GgufFile, key: str) -> dict[str, Any]:
    text = file.metadata.get(key, "{}")
    try:
        content = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise WeightsError(f"{file.path} has no JSON object under {key}: write the file again.")
    return content
