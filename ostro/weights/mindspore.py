"""MindSpore checkpoints of MindFormers' Mixtral: one .ckpt or .safetensors, or what the ranks of a cluster wrote.

Names are those of MindFormers' Llama with stacked experts. `mindspore` is the layout that trains, experts as
[E, out, in]; `mindspore-gmm` the one its grouped matrix products want, [E, in, out]. Which of the two a file has
is told from its shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ostro.errors import ConfigError, WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import mindspore_ranks as ranks
from ostro.weights.ckpt_file import CkptFile, write_ckpt
from ostro.weights.folder import written_beside
from ostro.weights.hf_config import SaveTokenizer, config_fields, read_config, read_json, save_tokenizer, write_json
from ostro.weights.identify import preset_of, settle
from ostro.weights.mapped import TensorFile
from ostro.weights.mindspore_layout import MindSporeDegrees, strategies
from ostro.weights.reshard import Box
from ostro.weights.safetensors_file import SafetensorsFile, write_file
from ostro.weights.store import NO_HINTS, Hints, Reader, TensorInfo
from ostro.weights.stored import (
    AS_IT_IS,
    TRANSPOSED,
    FileTensor,
    Order,
    Piece,
    Source,
    SourceOf,
    StoredReader,
    file_tensors,
    streamed,
)
from ostro.weights.strategy import write_strategy

WHAT = "a MindSpore checkpoint (a .ckpt file, rank_… folders, or MindFormers' output folder)"
ORIENTATIONS = {False: "mindspore", True: "mindspore-gmm"}

_NAMES = {
    layout.EMBEDDING: "model.tok_embeddings.embedding_weight",
    layout.INPUT_NORM: "model.layers.{layer}.attention_norm.weight",
    layout.Q: "model.layers.{layer}.attention.wq.weight",
    layout.K: "model.layers.{layer}.attention.wk.weight",
    layout.V: "model.layers.{layer}.attention.wv.weight",
    layout.O: "model.layers.{layer}.attention.wo.weight",
    layout.POST_NORM: "model.layers.{layer}.ffn_norm.weight",
    layout.GATE: "model.layers.{layer}.feed_forward.router.dense.weight",
    layout.W13: "model.layers.{layer}.feed_forward.ffn.{half}.weight",
    layout.W2: "model.layers.{layer}.feed_forward.ffn.w2.weight",
    layout.NORM: "model.norm_out.weight",
    layout.HEAD: "lm_head.weight",
}
_QKV = "model.layers.{layer}.attention.w_qkv.weight"
_DROPLESS_GATE = "model.layers.{layer}.feed_forward.router_dense.weight"  # of use_gmm training (MoEV3)
_HALVES = ("w1", "w3")
_LAYERS = "model.layers."
_ADVICE = "the checkpoint is incomplete or of another model"
_SINGLE = "mixtral.ckpt"
# What a training checkpoint holds beside weights and moments (MindFormers' CheckpointMonitor and its optimizers).
_SCALARS = (
    "global_step",
    "learning_rate",
    "epoch_num",
    "step_num",
    "loss_scale",
    "scale_sense",
    "global_batch_size",
    "current_iterator_step",
    "last_overflow_iterator_step",
    "beta1_power",
    "beta2_power",
    "state_step",
)
_EXPERT_LAYOUT = "expert_layout"  # our key in the config.json beside a checkpoint: square experts look alike


@dataclasses.dataclass(frozen=True)
class Dialect:
    """MindFormers' variants: experts transposed for gmm, q, k and v in one matrix, the dropless router's name."""

    is_gmm: bool = False
    qkv_concat: bool = False
    is_dropless: bool = False


def source_of(model: ModelConfig, dialect: Dialect, prefix: str = "") -> SourceOf:
    """Return the map of a dialect; `prefix` is that of an optimizer's moment."""

    def source(parameter: layout.Parameter, stack: tuple[int, ...]) -> Source:
        kind, shape = parameter.kind, parameter.shape
        name = _DROPLESS_GATE if dialect.is_dropless and kind is layout.GATE else _NAMES[kind]
        if dialect.qkv_concat and kind in _QKV_ROWS:
            rows = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
            return Source(
                prefix + _QKV.format(layer=parameter.layer), (rows, model.hidden_size), order=_rows(model, kind)
            )
        if not stack:
            return Source(prefix + name.format(layer=parameter.layer), shape)
        expert, *half = stack
        matrix = (shape[-1], shape[-2]) if dialect.is_gmm else shape[-2:]
        name = name.format(layer=parameter.layer, half=_HALVES[half[0]] if half else "")
        return Source(prefix + name, (shape[0], *matrix), (expert,), order=TRANSPOSED if dialect.is_gmm else AS_IT_IS)

    return source


_QKV_ROWS = (layout.Q, layout.K, layout.V)


def _rows(model: ModelConfig, kind: layout.Kind) -> Order:
    """Return how q, k or v stands in w_qkv: for each key head its query heads' rows, then its own, then its values'."""
    group = model.num_attention_heads // model.num_key_value_heads
    rows = {layout.Q: slice(0, group), layout.K: slice(group, group + 1), layout.V: slice(group + 1, group + 2)}[kind]

    def load(held: Tensor) -> Tensor:
        heads = held.view(model.num_key_value_heads, group + 2, model.head_dim, held.shape[-1])
        return heads[:, rows].reshape(-1, held.shape[-1])

    def save(piece: Tensor) -> Tensor:
        raise AssertionError("w_qkv is written whole, by _concat_qkv")

    return Order(load, save)


def detect(path: Path) -> bool:
    """Whether `path` looks like this format, sound or not."""
    if path.is_file() and path.suffix != ".safetensors":
        return path.suffix == ".ckpt"
    folder = ranks.rank_folders(path)
    files = [path] if folder is None and path.is_file() else ranks.files_in(folder or path)
    others = [file for file in files if file.suffix != ".ckpt"]
    return any(map(_is_ours, others)) if others else bool(files)


def open_reader(path: Path, hints: Hints = NO_HINTS) -> StoredReader:
    """Open a file, the folder of one, rank folders, a rank's file (for all ranks), or MindFormers' output folder."""
    if hints.step is not None and path.is_file():
        raise ConfigError(f"--step {hints.step} chooses from a folder, and {path} is a file: leave it out.")
    folder = ranks.rank_folders(path)
    if folder is None:
        if hints.strategy is not None:
            raise ConfigError(
                f"--strategy {hints.strategy} is for rank folders, and {path} is not in one: leave it out."
            )
        single = ranks.open_file(ranks.file_of(path, hints.step))
        file: TensorFile = single
        notes = [f"the file is {single.path.name}"] if single.path != path else []
        certify = single.check_crc if isinstance(single, CkptFile) else None
        if isinstance(single, CkptFile) and (single.strings or single.unsupported):
            left_out = ", ".join([*single.strings, *single.unsupported][:4])
            notes.append(f"{len(single.strings) + len(single.unsupported)} entries that are no tensors: {left_out}")
        folder = single.path.parent
    else:
        gathered = ranks.gather(folder, path, hints)
        file, notes, certify = gathered.file, gathered.notes, gathered.certify
    weights, others = _sorted_out(file)
    model, dialect = _model(path, folder, weights, file, hints, notes)
    reader = StoredReader(
        ORIENTATIONS[dialect.is_gmm],
        file.path,
        model,
        dict.fromkeys(weights, file),
        source_of(model, dialect),
        layers=_LAYERS,
        notes=notes,
        advice=_ADVICE,
        certify=certify,
        others=dict.fromkeys(others, file),
    )
    if others:
        num_moments = sum(name.startswith(ranks.OPTIMIZER_PREFIXES) for name in others)
        notes.append(
            f"{num_moments} tensors and {len(others) - num_moments} scalars of the optimizer beside the weights"
        )
        reader.notes = tuple(notes)
    return reader


def write(
    reader: Reader,
    path: Path,
    *,
    is_gmm: bool = False,
    qkv_concat: bool = False,
    degrees: MindSporeDegrees | None = None,
    host_ranks: Sequence[int] | None = None,
    optimizer: StoredReader | None = None,
    tokenizer: SaveTokenizer = None,
) -> Sequence[str]:
    """Write one file (`path` ends in .ckpt or .safetensors), a folder with one, or rank folders with strategy files.

    With `degrees` the folder is like MindFormers' output: checkpoint/rank_N and strategy, `host_ranks` are the ranks
    to write (all unless given). `optimizer` is the MindSpore checkpoint whose moments and scalars come along. Raises
    WeightsError for a target that exists, LayoutError for degrees that do not fit, OutOfMemory for a full disk.
    """
    dialect = Dialect(is_gmm, qkv_concat)
    tensors = file_tensors(reader, source_of(reader.model, dialect))
    if qkv_concat:
        tensors = _concat_qkv(tensors, reader)
    scalars: dict[str, Tensor] = {}
    if optimizer is not None:
        moments, scalars = _optimizer(optimizer, dialect)
        tensors |= moments
    is_file = path.suffix in ranks.SUFFIXES
    if degrees is not None:
        if is_file or qkv_concat:
            raise ConfigError("--layout writes folders, with q, k and v apart: name a folder, without qkv_concat.")
        degrees.check(reader.model)
    files = {_SINGLE: _Content(tensors)} if degrees is None else _ranks(tensors, reader.model, degrees, host_ranks)
    num_bytes = sum(content.num_bytes for content in files.values())
    with written_beside(path, needed_bytes=num_bytes + (1 << 20), is_file=is_file) as target:
        if is_file:
            _write_file(target, path.suffix, _Content(tensors), scalars)
            told = preset_of(reader.model) is not None
            return (
                ()
                if told
                else ("one file has no configuration, and no preset these sizes: keep the model's config.json",)
            )
        fields = config_fields(reader.model, reader.names()[layout.EMBEDDING.name].dtype)
        write_json(target / "config.json", fields | {_EXPERT_LAYOUT: ORIENTATIONS[is_gmm]})
        save_tokenizer(tokenizer, target)
        for name, content in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            _write_file(target / name, ".ckpt", content, scalars)
        if degrees is not None:
            (target / "strategy").mkdir()
            for strategy in strategies(tensors, reader.model, degrees):
                name = f"ckpt_strategy_rank_{strategy.stage * degrees.ranks_per_stage}.ckpt"
                write_strategy(target / "strategy" / name, strategy, degrees.pp)
    return ()


@dataclasses.dataclass(frozen=True)
class _Content:
    """What goes into one file: tensors, or the boxes of them that are a rank's."""

    tensors: dict[str, FileTensor]
    boxes: dict[str, Box] | None = None

    @property
    def infos(self) -> dict[str, TensorInfo]:
        if self.boxes is None:
            return {name: tensor.info for name, tensor in self.tensors.items()}
        return {name: TensorInfo(self.boxes[name].sizes, tensor.info.dtype) for name, tensor in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.infos.values())


def _ranks(
    tensors: dict[str, FileTensor], model: ModelConfig, degrees: MindSporeDegrees, host_ranks: Sequence[int] | None
) -> dict[str, _Content]:
    """Return the content of each rank's file, by its path."""
    found = {}
    for strategy in strategies(tensors, model, degrees):
        first = strategy.stage * degrees.ranks_per_stage
        mine = {name: tensors[name] for name in strategy.layouts}
        for local in range(degrees.ranks_per_stage):
            rank = first + local
            if host_ranks is not None and rank not in host_ranks:
                continue
            boxes = {
                name: layout.box(local, layout.local_shape(mine[name].info.shape))
                for name, layout in strategy.layouts.items()
            }
            found[f"checkpoint/rank_{rank}/checkpoint_{rank}.ckpt"] = _Content(mine, boxes)
    return found


def _write_file(path: Path, suffix: str, content: _Content, scalars: Mapping[str, Tensor]) -> None:
    """Write one file, the scalars last."""
    infos = content.infos | {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in scalars.items()}
    stream = streamed(content.tensors.values(), content.boxes)

    def parts(name: str) -> Iterable[Tensor]:
        return [scalars[name]] if name in scalars else stream(name)

    if suffix == ".ckpt":
        write_ckpt(path, infos, parts)
    else:
        write_file(path, infos, parts, {"format": "ms"})


def _concat_qkv(tensors: dict[str, FileTensor], reader: Reader) -> dict[str, FileTensor]:
    """Return the tensors with q, k and v in one, made of the rows of one head group after another."""
    model = reader.model
    group, width = model.num_attention_heads // model.num_key_value_heads, model.head_dim
    infos = reader.names()
    found: dict[str, FileTensor] = {}
    for tensor in tensors.values():
        q_name, source = tensor.pieces[0].name, tensor.pieces[0].source
        if tensor.name in found or not source.name.endswith(".w_qkv.weight"):
            found.setdefault(tensor.name, tensor)
            continue
        names = [q_name, *(q_name.replace(".q_proj.", f".{letter}_proj.") for letter in "kv")]
        if len({infos[name].dtype for name in names}) > 1:
            raise WeightsError(f"{q_name} and its k and v differ in type, and one tensor has one: say --dtype.")
        pieces = [
            Piece(name, (), slice(head * rows, (head + 1) * rows), Source(tensor.name, source.shape))
            for head in range(model.num_key_value_heads)
            for name, rows in zip(names, (group * width, width, width), strict=True)
        ]
        found[tensor.name] = dataclasses.replace(tensor, pieces=tuple(pieces))
    return found


def moments(held: StoredReader) -> dict[str, StoredReader]:
    """Return the moments of the optimizer beside a MindSpore checkpoint's weights, each as a reader, by their prefix.

    Raises WeightsError for one that is not of every parameter.
    """
    found: dict[str, StoredReader] = {}
    dialect = _dialect(held.held(), held.format)
    for prefix in ranks.OPTIMIZER_PREFIXES:
        files = {name: file for name, file in held.others.items() if name.startswith(prefix)}
        if files:
            map = source_of(held.model, dialect, prefix)
            found[prefix] = StoredReader(held.format, held.path, held.model, files, map, layers=prefix + _LAYERS)
            found[prefix].check()
    return found


def _optimizer(held: StoredReader, dialect: Dialect) -> tuple[dict[str, FileTensor], dict[str, Tensor]]:
    """Return the moments as tensors to write in a dialect, and the scalars."""
    tensors: dict[str, FileTensor] = {}
    for prefix, moment in moments(held).items():
        written = file_tensors(moment, source_of(held.model, dialect, prefix))
        tensors |= _concat_qkv(written, moment) if dialect.qkv_concat else written
    if not tensors:
        raise WeightsError(f"{held.path} holds no optimizer: convert it without --optimizer.")
    rest = [name for name in held.others if not name.startswith(ranks.OPTIMIZER_PREFIXES)]
    return tensors, {name: held.others[name].tensor(name) for name in rest}


def _sorted_out(file: TensorFile) -> tuple[list[str], list[str]]:
    """Return the names of the tensors that may be the model's, and of those that are the optimizer's or the run's."""
    names: tuple[list[str], list[str]] = ([], [])
    for name, info in file.infos.items():
        is_other = name.startswith(ranks.OPTIMIZER_PREFIXES) or name in _SCALARS or not info.shape
        names[is_other].append(name)
    return names


def _model(
    path: Path, folder: Path, weights: Sequence[str], file: TensorFile, hints: Hints, notes: list[str]
) -> tuple[ModelConfig, Dialect]:
    """Return the architecture and the dialect: as told, as a config.json beside it says, or of the preset that fits."""
    infos = {name: file.infos[name] for name in weights}
    # The folder above is the run's own where the tensors lie in rank folders.
    around = (path, folder, folder.parent) if isinstance(file, ranks.GatheredFile) else (path, folder)
    config = next((place / "config.json" for place in around if (place / "config.json").is_file()), None)
    marker = read_json(config).get(_EXPERT_LAYOUT) if config else None
    dialect = _dialect(infos, hints.format or (marker if isinstance(marker, str) else None), str(path))
    try:
        held = read_config(config) if config else None
    except WeightsError as error:
        if hints.model is None:
            raise
        held = None
        notes.append(f"passed over: {error}")
    model, said = settle(path, hints.model, held, infos, lambda config: source_of(config, dialect), _LAYERS)
    notes += said
    return model, dialect


def _dialect(infos: Mapping[str, TensorInfo], told: str | None, path: str = "") -> Dialect:
    qkv_concat = any(name.endswith(".attention.w_qkv.weight") for name in infos)
    is_dropless = any(name.endswith(".router_dense.weight") for name in infos)
    hidden = next((info.shape[-1] for name, info in infos.items() if name.endswith("norm.weight") and info.shape), None)
    experts = next((info.shape for name, info in infos.items() if name.endswith(".ffn.w1.weight")), ())
    if len(experts) != 3 or experts[1] != experts[2]:
        return Dialect(len(experts) == 3 and experts[1] == hidden, qkv_concat, is_dropless)
    if told not in ORIENTATIONS.values():
        raise WeightsError(
            f"{path} has square experts, so their orientation cannot be seen: say --from "
            "mindspore or --from mindspore-gmm."
        )
    return Dialect(told == ORIENTATIONS[True], qkv_concat, is_dropless)


def _is_ours(path: Path) -> bool:
    """Whether a .safetensors file has MindFormers' names."""
    try:
        names = SafetensorsFile(path).infos
    except WeightsError:
        return False
    return any(
        ".attention.w" in name or name == _NAMES[layout.EMBEDDING] for name in names if name.startswith("model.")
    )
