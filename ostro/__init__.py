"""Ostro takes Mixtral from text to a model that writes.

The names below are loaded on first use, so that `import ostro` costs nothing. The two verbs that share
their name with a module, `ostro.train.train` and `ostro.evaluate.evaluate`, are taken from there: an
attribute of a package cannot be its submodule and a function at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ostro.config import Config, load_config
    from ostro.data.loader import Loader
    from ostro.data.prepare import prepare
    from ostro.data.shards import open_shards
    from ostro.data.tokenizer import Tokenizer, load_tokenizer
    from ostro.errors import Error
    from ostro.model.mixtral import Mixtral
    from ostro.model.settings import ModelConfig, MoeConfig
    from ostro.model.spans import Spans
    from ostro.serve.engine import Engine
    from ostro.serve.sampling import Sampling
    from ostro.weights import convert, open_reader

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Engine",
    "Error",
    "Loader",
    "Mixtral",
    "ModelConfig",
    "MoeConfig",
    "Sampling",
    "Spans",
    "Tokenizer",
    "convert",
    "load_config",
    "load_tokenizer",
    "open_reader",
    "open_shards",
    "prepare",
]

_HOMES = {
    "Config": "ostro.config",
    "Engine": "ostro.serve.engine",
    "Error": "ostro.errors",
    "Loader": "ostro.data.loader",
    "Mixtral": "ostro.model.mixtral",
    "ModelConfig": "ostro.model.settings",
    "MoeConfig": "ostro.model.settings",
    "Sampling": "ostro.serve.sampling",
    "Spans": "ostro.model.spans",
    "Tokenizer": "ostro.data.tokenizer",
    "convert": "ostro.weights",
    "load_config": "ostro.config",
    "load_tokenizer": "ostro.data.tokenizer",
    "open_reader": "ostro.weights",
    "open_shards": "ostro.data.shards",
    "prepare": "ostro.data.prepare",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ostro' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
