"""A model of any format in memory, with a LoRA adapter or in 4 bits where that is asked for, and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from ostro import device as devices
from ostro.config import load_config, recipe_names
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import ConfigError, WeightsError, nearest
from ostro.model import layout, lora
from ostro.model.mixtral import Mixtral
from ostro.model.quant import why_not
from ostro.model.settings import LoraConfig, ModelConfig
from ostro.weights import lora_run, open_reader
from ostro.weights.adapters import Adapter, open_adapter
from ostro.weights.located import located
from ostro.weights.merged import Merged
from ostro.weights.parts import hold, load_quantized, load_weights
from ostro.weights.store import CastReader, Reader, load_into

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def checkpoint_of(model: str) -> str:
    """Return the checkpoint that MODEL means: of a recipe (a shipped name or a YAML file) its weights.path.

    Raises ConfigError where that is null.
    """
    path = Path(model)
    if not (path.is_file() and path.suffix in (".yaml", ".yml")) and (path.exists() or model not in recipe_names()):
        return model
    found = load_config(model).weights.path
    if found is None:
        raise ConfigError(
            f"recipe {model} has no weights.path, so there is no model of it yet: name a checkpoint or a run directory."
        )
    return found


def empty_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Mixtral:
    """Return a model for inference with uninitialised weights in `dtype`; the router's stay fp32."""
    with torch.device("meta"):
        model = Mixtral(config, compute_dtype=dtype).to(dtype)
        for block in model.blocks.values():
            block.block_sparse_moe.gate.float()
    return model.to_empty(device=device).requires_grad_(False).eval()


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype a command line names: bf16, fp16 or fp32."""
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}.{nearest(name, _DTYPES)}")
    return _DTYPES[name]


def load_model(
    source: str | Path | Reader,
    dtype: str = "auto",
    device: torch.device | None = None,
    adapter: str | Path | None = None,
) -> Mixtral:
    """Load a checkpoint of any format, or a run directory, for inference, with a LoRA adapter if one is given.

    dtype is `bf16`, `fp16`, `fp32`; `nf4`, which keeps attention and experts in 4 bits and the adapter beside them
    instead of merging it; or `auto`: a run's own where it trained over 4 bits, else the checkpoint's, but fp32 on a CPU
    without bf16 units.
    """
    device = device or devices.accelerator()
    opened = _opened(source, adapter)
    if isinstance(opened, lora_run.LoraRun):
        if dtype == "nf4" or (dtype == "auto" and opened.adapter.lora.quantize):
            return _in_four_bits(opened.base(), opened.adapter, device)
        reader, corrections = opened.base(), opened.adapter
    else:
        reader = opened
        corrections = None if adapter is None else open_adapter(adapter, reader.model)
    if dtype == "nf4":
        return _in_four_bits(reader, corrections, device)
    wanted = _native(reader, device) if dtype == "auto" else torch_dtype(dtype)
    if corrections is not None:
        reader = Merged(reader, corrections, CastReader(reader, wanted, keep_fp32=True).names())
    model = empty_model(reader.model, wanted, device)
    load_into(model, reader)
    return model


def _opened(source: str | Path | Reader, adapter: str | Path | None) -> Reader | lora_run.LoraRun:
    if not isinstance(source, str | Path):
        return source
    path = located(source)
    return lora_run.open_run(path) if adapter is None and lora_run.detect(path) else open_reader(path)


def _native(reader: Reader, device: torch.device) -> torch.dtype:
    """Return the dtype a checkpoint is computed in unless another is asked for."""
    stored = next(iter(reader.names().values())).dtype
    return torch.float32 if stored == torch.float32 or _is_slow(device) else torch.bfloat16


def _is_slow(device: torch.device) -> bool:
    return device.type == "cpu" and not devices.bf16_is_fast()


def _in_four_bits(reader: Reader, adapter: Adapter | None, device: torch.device) -> Mixtral:
    """Load a model with attention and experts in NF4, as QLoRA trains it, and LoRA's parameters beside them."""
    config = reader.model
    for cols in (config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size):
        reason = why_not(cols, cols)
        if reason is not None:
            raise ConfigError(f"dtype nf4 is not for this model: {reason}. Take bf16.")
    settings = adapter.lora if adapter is not None else LoraConfig()
    if settings.dora:
        raise ConfigError("dtype nf4 keeps no rows whole, whose norms DoRA asks for: take bf16, which merges it.")
    with torch.device("meta"):
        model = Mixtral(config, compute_dtype=torch.float32 if _is_slow(device) else torch.bfloat16)
        if adapter is not None:
            lora.add(model, config, settings)
        quantized = lora.keep_in_four_bits(model, config)
        for name, parameter in layout.table(config).items():
            if name not in quantized and not parameter.kind.is_small:
                holder = model.get_submodule(name.rpartition(".")[0])
                holder.to(model.compute_dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    parameters, adapters = dict(model.named_parameters()), layout.adapter_table(config, adapter and settings)
    load_weights(reader, hold({name: p for name, p in parameters.items() if name not in adapters}))
    load_quantized(reader, quantized)
    if adapter is not None:
        with torch.no_grad():
            for name in adapters:
                parameters[name].copy_(adapter.tensors[name])
    return model


def tokenizer_of(path: str | Path, override: str | None = None) -> Tokenizer:
    """Return the tokenizer that lies with a model: in its folder, or in the run directory it belongs to."""
    if override is not None:
        return load_tokenizer(override)
    found = tokenizer_beside(path)
    if found is None:
        raise WeightsError(f"{path} has no tokenizer beside its weights: name one with --tokenizer v1, v3 or a file.")
    return found


def tokenizer_beside(path: str | Path) -> Tokenizer | None:
    """Return the tokenizer that lies in a model's folder or in the run directory it belongs to, or None."""
    path = located(path)
    folder = path.parent if path.is_file() else path
    for candidate in (
        folder,
        folder / "tokenizer",
        folder.parent / "tokenizer",
        folder.parent.parent / "tokenizer",
    ):
        if (candidate / "tokenizer.json").is_file() or (candidate / "tokenizer.model").is_file():
            return load_tokenizer(candidate)
    return None
