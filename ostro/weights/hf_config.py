"""Hugging Face's config.json and generation_config.json, to and from `ModelConfig`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from ostro.errors import ConfigError, WeightsError
from ostro.model.settings import ModelConfig


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; WeightsError if it is missing or is not one."""
    try:
        content = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}): check the path.") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not sound JSON ({error}): fetch or write it again.") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not a JSON object: fetch or write it again.")
    return content


def read_config(path: Path) -> ModelConfig:
    """Return the architecture that a config.json describes; WeightsError where `ModelConfig.from_hf` refuses it."""
    try:
        return ModelConfig.from_hf(read_json(path))
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error


def config_fields(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return a config.json that transformers 4 and 5 both read; `dtype` is e.g. bfloat16."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        **model.as_fields(),
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def generation_fields(model: ModelConfig) -> dict[str, Any]:
    """Return a generation_config.json: the special ids, and nothing said about sampling."""
    fields = {
        "_from_model_config": True,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
    }
    return fields if model.pad_token_id is None else fields | {"pad_token_id": model.pad_token_id}


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")
