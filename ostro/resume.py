"""What a training checkpoint says beside its tensors, and whether a run may go on from one."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ostro import log
from ostro.config import Config
from ostro.data.sources import parse_weight
from ostro.errors import ConfigError
from ostro.weights import Start, dcp, located


def section(name: str) -> str:
    """Return the section of a recipe in which a setting of the model stands."""
    return "moe" if name == "router" else "model"


def data_state(config: Config, *, tokenizer_sha256: str, data_sha256: str) -> dict[str, Any]:
    """Return what decides which tokens a step sees: its position is the step, since order is a pure function of
    (seed, step) over these tokens, cut like this."""
    return {
        **({} if config.lora is None else {"weights": _start_fields(config)}),
        "data.tokenizer (sha256)": tokenizer_sha256,
        "data.seq_length": config.data.seq_length,
        "data.path (sha256)": data_sha256,
        "data.path (shares)": [parse_weight(path)[1] for path in config.data.path],
        "data.weights_by": config.data.weights_by,
        "data.packing": config.data.packing,
        "data.overlong": config.data.overlong,
        "data.pad_token_id": config.data.pad_token_id,
        "data.shuffle": config.data.shuffle,
        "train.seed": config.train.seed,
        "train.global_batch_sequences": config.train.global_batch_sequences,
    }


def start_of(config: Config) -> Start:
    """Return what a run starts from; a LoRA run, each time that it goes on."""
    weights = config.weights
    return Start(weights.path, config.model, config.train.seed, weights.strategy, weights.upcycle)


def _start_fields(config: Config) -> dict[str, Any]:
    """Return `start_of` as a LoRA run's checkpoints keep it: paths absolute, of another run its newest step."""
    start = start_of(config)
    path = start.path and located(start.path)
    if isinstance(path, Path) and dcp.detect(path):  # that run may go on, and this one's base with it
        path = dcp.find(path) or path
    strategy = start.strategy and os.path.abspath(start.strategy)
    return {"path": path and str(path), "seed": start.seed, "strategy": strategy, "upcycle": start.upcycle}


def state_of(
    config: Config, data: Mapping[str, Any], *, step: int, num_tokens: int, loop: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state of a run after `step` steps, random numbers and what the `loop` remembers included."""
    return {
        "step": step,
        "num_tokens": num_tokens,
        "loop": loop,
        "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "data": data,
        "model": config.model.as_fields(),
        "lora": config.lora and config.lora.model_dump(mode="json"),
        "config": _settings(config),
    }


def require_same(folder: Path, state: Mapping[str, Any], config: Config, data: Mapping[str, Any]) -> None:
    """Raise ConfigError for a model or data other than the checkpoint's; say what else has changed."""
    before = {"router": "softmax", **state["model"]}
    for name, now, then in (
        *((f"{section(k)}.{k}", v, before.get(k)) for k, v in dataclasses.asdict(config.model).items()),
        *((k, v, state["data"].get(k)) for k, v in data.items()),
        ("lora", config.lora and config.lora.model_dump(mode="json"), state.get("lora")),
    ):
        if now != then:
            raise ConfigError(
                f"{folder} was trained with {name}={then!r} and the config says {now!r}: change it back to resume, "
                "or choose another run.dir."
            )
    settings, defaults = _settings(config), _settings(Config())  # a setting newer than the checkpoint had its default
    for name in ("train", "optim", "moe"):
        for key, value in settings[name].items():
            earlier = state["config"][name].get(key, defaults[name][key])
            if value != earlier:
                log.say(
                    f"from step {state['step']} on, {name}.{key} is {value!r} instead of {earlier!r}", style="yellow"
                )


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set the random numbers to where the checkpoint left them."""
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["rng"])), dtype=torch.uint8))


def _settings(config: Config) -> dict[str, Any]:
    return json.loads(config.model_dump_json(by_alias=True, exclude={"model"}))
