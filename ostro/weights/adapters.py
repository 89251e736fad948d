"""LoRA adapters on disk, in PEFT's format: adapter_config.json beside adapter_model.safetensors.

Module names are those of transformers, not of its checkpoints. Since transformers 5 the experts of a layer are two
stacked parameters, which PEFT wraps one around the other (its `ParamWrapper`): `mlp.experts.base_layer` is the inner
one, gate and up with one A for both, `mlp.experts` the outer. A holds expert after expert, B's columns hold rank after
rank with the experts innermost. With transformers 4 each expert had linear modules w1, w2 and w3, each with an A of its
own: with w1's and w3's stacked, and B in two blocks, that is one A of twice the rank.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ostro.errors import ConfigError, WeightsError
from ostro.model import layout
from ostro.model.layout import LORA_A, LORA_B, LORA_MAGNITUDE
from ostro.model.settings import NO_DROPOUT_NO_DORA, TARGETS, LoraConfig, ModelConfig
from ostro.weights.adapter_config import AdapterConfig, adapter_config_fields, read_adapter_config
from ostro.weights.folder import written_beside
from ostro.weights.hf import open_file
from ostro.weights.hf_config import write_json
from ostro.weights.mapped import TensorFile
from ostro.weights.safetensors_file import write_file
from ostro.weights.store import Shape, TensorInfo, match_shapes, require_finite
from ostro.weights.stored import FLOATS

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# Whole matrices of the base, which PEFT saves along where it corrected the embedding.
_COPIES = {
    f"{_PREFIX}{kind.name.removesuffix('weight')}base_layer.weight": kind.name
    for kind in (layout.EMBEDDING, layout.HEAD)
}
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>[\w.]+?)\."
    r"(?:(?P<linear>lora_[AB])\.weight|lora_embedding_(?P<embedding>[AB])|lora_magnitude_vector(?:\.weight)?)"
)
_OF_ONE_EXPERT = re.compile(r"(?P<layer>model\.layers\.\d{1,6}\.)\w+\.experts\.(?P<expert>\d{1,6})\.(?P<weight>w[123])")
_HALF = {"w1": 0, "w3": 1}

Parts = dict[str, Tensor]
"""A, B and perhaps the magnitude of one module."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA's tensors, under the names and in the shapes of `layout.adapter_table`, of any floating-point type.

    `copies` are whole matrices of the base, by their canonical names, that were saved along; `notes` are words on what
    was found.
    """

    lora: LoraConfig
    tensors: Mapping[str, Tensor]
    copies: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_adapter(path: str | Path, model: ModelConfig) -> Adapter:
    """Read an adapter of `model`: a folder of PEFT's, or a run directory with one, `adapter`, or with checkpoints."""
    from ostro.weights import lora_run  # which writes adapters, too

    if lora_run.detect(Path(path)):  # its checkpoints may be newer than the folder
        return lora_run.open_run(Path(path)).adapter
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / CONFIG).is_file():
            return read_peft(folder, model)
    raise WeightsError(
        f"{path} holds no {CONFIG}, and no folder 'adapter' that does: give the folder that PEFT or a run wrote."
    )


def read_peft(folder: Path, model: ModelConfig) -> Adapter:
    """Read PEFT's folder as an adapter of `model`; tensors are views of the file where they can be.

    Where ranks or scales differ (`rank_pattern`, `alpha_pattern`, w1 and w3 with an A each), all get the largest rank,
    filled up with zeros, and B takes up the scale: the product is the same. Raises WeightsError for what has no
    counterpart here, for tensors that `model` has no place for or that are missing, and for NaN.
    """
    asked = read_adapter_config(folder / CONFIG)
    path = next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[0])
    file = open_file(path)
    found = list(_found(path, _modules(file), asked, model))
    if not found:
        raise WeightsError(f"{path} holds no tensor of LoRA's: save the adapter again.")
    lora, notes = _common(folder / CONFIG, found, asked)
    tensors = {name: value for one in found for name, value in _fitted(one, lora).items()}
    table = layout.adapter_table(model, lora)
    if asked.layers and not lora.dora:  # the layers that it leaves out are corrected by nothing
        for name, parameter in table.items():
            if parameter.layer not in (None, *asked.layers):
                tensors.setdefault(name, torch.zeros(1).expand(parameter.shape))
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    match_shapes(str(path), shapes, {p.name: p.shape for p in table.values()}, "save or fetch the adapter again")
    for name, value in tensors.items():
        require_finite(value, f"{name} of {path}")
    copies = {name: file.tensor(stored) for stored, name in _COPIES.items() if stored in file.infos}
    return Adapter(lora, {name: tensors[name] for name in table}, copies, notes)


def write_peft(folder: Path, adapter: Adapter, model: ModelConfig, base_name: str, *, replace: bool = False) -> None:
    """Write a folder that PEFT loads onto transformers' Mixtral; it appears whole or not at all.

    `base_name` is what the adapter belongs to: a path, or a name on the hub. With `replace` it may take the place of
    another. Raises WeightsError for a target that is not empty, OutOfMemory for a full disk.
    """
    lora = adapter.lora
    tensors: dict[str, Tensor] = {}
    for parameter in layout.parameters(model):
        if parameter.kind.target in lora.matrices:
            for part, name in _names(parameter, lora.dora).items():
                value = adapter.tensors[name].detach()
                tensors[_peft_name(parameter, part, lora)] = _to_peft(parameter, part, value)
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in sorted(tensors.items())}
    needed_bytes = sum(info.num_bytes for info in infos.values()) + (1 << 20)
    with written_beside(folder, needed_bytes=needed_bytes, replace=replace) as partial:
        write_json(partial / CONFIG, adapter_config_fields(lora, base_name))
        write_file(partial / _FILES[0], infos, lambda name: [tensors[name].cpu()])


def _names(parameter: layout.Parameter, dora: bool) -> dict[str, str]:
    """Return the canonical names of a parameter's A, B and, with DoRA, magnitude."""
    kinds = layout.adapter_kinds(parameter.kind, dora)
    names = (kind.name.format(layer=parameter.layer) for kind in kinds)
    return dict(zip((LORA_A, LORA_B, LORA_MAGNITUDE), names, strict=False))


def _is_expert(parameter: layout.Parameter) -> bool:
    return parameter.kind in (layout.W13, layout.W2)


def _peft_name(parameter: layout.Parameter, part: str, lora: LoraConfig) -> str:
    module = parameter.name.removesuffix(".weight").replace(".block_sparse_moe.", ".mlp.")
    if _is_expert(parameter):
        is_inner = parameter.kind is layout.W13 and layout.W2.target in lora.matrices
        module = module.rpartition(".")[0] + (".base_layer" if is_inner else "")
    if part == LORA_MAGNITUDE:
        return f"{_PREFIX}{module}.lora_magnitude_vector"
    if parameter.kind is layout.EMBEDDING:
        return f"{_PREFIX}{module}.{part.replace('lora_', 'lora_embedding_')}"
    return f"{_PREFIX}{module}.{part}.weight"


def _to_peft(parameter: layout.Parameter, part: str, value: Tensor) -> Tensor:
    """Return the experts' factors as PEFT has them, A [E·r, in] and B [out, r·E]; others as they are."""
    if not _is_expert(parameter):
        return value
    if part == LORA_A:
        return value.flatten(0, 1)
    return value.reshape(len(value), -1, value.shape[-1]).permute(1, 2, 0).flatten(1)


def _from_peft(parameter: layout.Parameter, parts: Parts) -> Parts:
    """Return the experts' factors as `layout.adapter_table` has them, views; others as they are."""
    if not _is_expert(parameter):
        return parts
    num_experts = parameter.shape[0]
    b = parts[LORA_B].unflatten(1, (-1, num_experts)).permute(2, 0, 1)
    if parameter.kind is layout.W13:
        b = b.unflatten(1, (2, -1))
    return {LORA_A: parts[LORA_A].unflatten(0, (num_experts, -1)), LORA_B: b}


def _modules(file: TensorFile) -> dict[str, Parts]:
    """Return the tensors by the module they correct, without PEFT's prefix."""
    modules: dict[str, Parts] = {}
    for name, info in file.infos.items():
        match = _TENSOR.fullmatch(name)
        if name in _COPIES:
            continue
        if match is None:
            raise WeightsError(f"{file.path} holds {name}, which is no tensor of a LoRA adapter: it cannot be used.")
        if info.dtype not in FLOATS:
            raise WeightsError(f"{file.path} holds {name} as {info.dtype}: a floating-point type belongs there.")
        part = match["linear"] or (f"lora_{match['embedding']}" if match["embedding"] else LORA_MAGNITUDE)
        modules.setdefault(match["module"], {})[part] = file.tensor(name)
    for module, parts in modules.items():
        absent = [part for part in (LORA_A, LORA_B) if part not in parts]
        if absent:
            raise WeightsError(f"{file.path} lacks {absent[0]} of {module}: save or fetch the adapter again.")
    return modules


@dataclasses.dataclass(frozen=True)
class _Found:
    """The factors of one parameter as they were trained: canonical, but of a rank and a scale of their own."""

    parameter: layout.Parameter
    parts: Parts
    scale: float

    @property
    def rank(self) -> int:
        return self.parts[LORA_A].shape[-2]


def _found(path: Path, modules: Mapping[str, Parts], asked: AdapterConfig, model: ModelConfig) -> Iterator[_Found]:
    """Yield the factors of every parameter, their shapes held against the model's."""
    table = layout.table(model)
    alone: dict[str, dict[tuple[int, str], str]] = {}
    for module, parts in modules.items():
        if match := _OF_ONE_EXPERT.fullmatch(module):
            name = f"{match['layer']}block_sparse_moe.experts.{'w2' if match['weight'] == 'w2' else 'w13'}"
            alone.setdefault(name, {})[int(match["expert"]), match["weight"]] = module
            continue
        name, key = _corrected(module, parts, model)
        parameter = table.get(name)
        if parameter is None or parameter.kind.target not in TARGETS:
            raise WeightsError(f"{path} corrects {module}, which this model has not or Ostro does not correct.")
        rank, scale = asked.at(key)
        num_stacked = parameter.shape[0] if _is_expert(parameter) else 1
        out, inner = math.prod(parameter.shape[-2 - (parameter.kind is layout.W13) : -1]), parameter.shape[-1]
        if parameter.kind is layout.EMBEDDING:
            out, inner = inner, out
        _require_shapes(path, module, parts, (num_stacked * rank, inner), (out, num_stacked * rank))
        yield _Found(parameter, _from_peft(parameter, parts), scale)
    for name, held in alone.items():
        if name not in table:
            raise WeightsError(f"{path} corrects {next(iter(held.values()))}, which this model has not.")
        yield _stacked(path, table[name], held, modules, asked)


def _corrected(module: str, parts: Parts, model: ModelConfig) -> tuple[str, str]:
    """Return the canonical name of the parameter that a module corrects, and what PEFT's patterns are held against."""
    experts = module.removesuffix(".base_layer")
    if experts.endswith(".mlp.experts"):
        # Which of the two is wrapped inside, or alone, their shapes tell.
        sizes = (parts[LORA_A].shape[-1], parts[LORA_B].shape[0])
        is_w13 = sizes == (model.hidden_size, 2 * model.intermediate_size) or experts != module
        name, key = ("w13", "gate_up_proj") if is_w13 else ("w2", "down_proj")
        return f"{experts.replace('.mlp.', '.block_sparse_moe.')}.{name}", f"{experts}.{key}"
    name = f"{module.replace('.mlp.', '.block_sparse_moe.')}.weight"
    return name, f"{module}.weight" if module.endswith(".mlp.gate") else module


def _stacked(
    path: Path,
    parameter: layout.Parameter,
    held: Mapping[tuple[int, str], str],
    modules: Mapping[str, Parts],
    asked: AdapterConfig,
) -> _Found:
    """Return one A and B an expert for modules w1 and w3, or w2: A's under each other, B's in a block each."""
    weights = sorted({weight for _, weight in held})
    num_experts, out, inner = parameter.shape[0], *parameter.shape[-2:]
    lacking = [(expert, weight) for expert in range(num_experts) for weight in weights if (expert, weight) not in held]
    if lacking or len(held) != num_experts * len(weights):
        raise WeightsError(
            f"{path} corrects {', '.join(weights)} of other experts than the {num_experts} of {parameter.name}: give "
            "the adapter of this model, whole."
        )
    settings = {asked.at(module) for module in held.values()}
    if len(settings) > 1:
        raise WeightsError(f"{path} has different ranks or scales within {parameter.name}, one is possible.")
    ((rank, scale),) = settings
    for module in held.values():
        _require_shapes(path, module, modules[module], (rank, inner), (out, rank))
    a = torch.stack([torch.cat([modules[held[e, weight]][LORA_A] for weight in weights]) for e in range(num_experts)])
    b = a.new_zeros((*parameter.shape[:-1], rank * len(weights)))
    for (expert, weight), module in held.items():
        half = (expert, _HALF[weight]) if weight in _HALF else (expert,)
        block = weights.index(weight) * rank
        b[half][:, block : block + rank] = modules[module][LORA_B]
    return _Found(parameter, {LORA_A: a, LORA_B: b}, scale)


def _require_shapes(path: Path, module: str, parts: Parts, a: Shape, b: Shape) -> None:
    for part, shape in ((LORA_A, a), (LORA_B, b)):
        held = tuple(parts[part].shape)
        if held != shape:
            raise WeightsError(
                f"{path} holds {part} of {module} with shape {held}, where this model and {CONFIG} ask for {shape}: it "
                "belongs to another model."
            )


def _common(path: Path, found: list[_Found], asked: AdapterConfig) -> tuple[LoraConfig, tuple[str, ...]]:
    """Return the one configuration that all factors can be brought to, and what there is to say about it."""
    rank = max(one.rank for one in found)
    targets = {one.parameter.kind.target for one in found}
    ratio, notes, dropout = rank / asked.rank, [], asked.dropout
    if len({(one.rank, one.scale) for one in found}) > 1:
        notes.append(f"its ranks or scales differ: all are of rank {rank} here, the rest of them zeros")
    if dropout and not targets.isdisjoint(NO_DROPOUT_NO_DORA):
        notes.append(f"its dropout of {dropout} in training is left out: Ostro has none for the experts")
        dropout = 0.0
    try:
        lora = LoraConfig(
            targets=tuple(name for name in TARGETS if name in targets),
            rank=rank,
            alpha=float(asked.alpha * (math.sqrt(ratio) if asked.rslora else ratio)),
            rslora=asked.rslora,
            dropout=dropout,
            dora=asked.dora,
        )
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error
    return lora, tuple(notes)


def _fitted(one: _Found, lora: LoraConfig) -> Parts:
    """Return the factors by their canonical names, with the common rank and scale."""
    names, missing = _names(one.parameter, lora.dora), lora.rank - one.rank
    fitted = dict(one.parts)
    if not math.isclose(one.scale, lora.scale, rel_tol=1e-12):
        fitted[LORA_B] = fitted[LORA_B].float() * (one.scale / lora.scale)
    if missing:
        fitted[LORA_A] = torch.nn.functional.pad(fitted[LORA_A], (0, 0, 0, missing))
        fitted[LORA_B] = torch.nn.functional.pad(fitted[LORA_B], (0, missing))
    return {names.get(part, f"{one.parameter.name}: {part}"): value for part, value in fitted.items()}
