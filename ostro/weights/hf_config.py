"""What lies beside the tensors: Hugging Face's config.json and generation_config.json, and tokenizer files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from ostro.errors import ConfigError, WeightsError
from ostro.model.settings import ModelConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

SaveTokenizer = Path | Callable[[Path], None] | None
"""A folder whose tokenizer files are copied, a function that saves a tokenizer into a folder, or none."""


def tokenizer_folder(path: Path) -> Path | None:
    """Return the folder of a checkpoint if tokenizer files lie in it."""
    folder = path if path.is_dir() else path.parent
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def save_tokenizer(tokenizer: SaveTokenizer, folder: Path) -> None:
    """Put the files of a tokenizer into `folder`; WeightsError for a folder that has none."""
    if tokenizer is None:
        return
    if callable(tokenizer):
        tokenizer(folder)
        return
    found = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not found:
        raise WeightsError(f"{tokenizer} holds no tokenizer file: give the folder that has tokenizer.json.")
    for file in found:
        shutil.copyfile(file, folder / file.name)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


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
    """Return the architecture that a config.json describes, be it Hugging Face's or sizes alone under the same names.

    WeightsError where `ModelConfig` refuses it.
    """
    return model_of(path, read_json(path))


def model_of(path: Path, fields: Mapping[str, Any]) -> ModelConfig:
    """Return the architecture that the fields of the config.json at `path` describe."""
    is_bare = "model_type" not in fields and fields.keys() <= {field.name for field in dataclasses.fields(ModelConfig)}
    try:
        return ModelConfig.from_fields(fields) if is_bare else ModelConfig.from_hf(fields)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error


def config_fields(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return a config.json that transformers 4 and 5 both read."""
    word = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        **model.as_fields(),
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": word,
        "torch_dtype": word,
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
