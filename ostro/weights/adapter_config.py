"""PEFT's adapter_config.json: what it says of the arithmetic, and what in it has no counterpart here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ostro.errors import WeightsError
from ostro.model.settings import LoraConfig
from ostro.weights.hf_config import read_json
from ostro.weights.store import printable

# What may stand there and changes nothing that is computed: the tensors themselves tell which modules they correct.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
)
_READ = (
    "alpha_pattern",
    "init_lora_weights",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "use_dora",
    "use_rslora",
)
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base's weights as they are


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says; `layers` None is all of them, patterns are PEFT's."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    dora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    layers: tuple[int, ...] | None

    def at(self, key: str) -> tuple[int, float]:
        """Return rank and scale of the module that PEFT calls `key`: of the first pattern that matches its end."""
        rank, alpha = _matched(self.ranks, key, self.rank), _matched(self.alphas, key, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read the file; WeightsError, by name, for what changes the result and cannot be expressed here."""
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":
        raise WeightsError(f"{path} says peft_type={_shown(fields.get('peft_type'))}: Ostro reads 'LORA'.")
    for name, value in fields.items():
        if value and name not in (*_READ, *_WITHOUT_EFFECT) and not (name == "bias" and value == "none"):
            raise WeightsError(
                f"{path} says {printable(name)}={_shown(value)}, which Ostro's LoRA has no counterpart for: merge it "
                "with PEFT, or train without it."
            )
    init = fields.get("init_lora_weights", True)
    if init not in _PLAIN_STARTS:
        raise WeightsError(
            f"{path} says init_lora_weights={_shown(init)}, which changes the base's weights too: save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion, which makes a plain one of it."
        )
    ranks = _pattern(path, fields, "rank_pattern") | {"r": fields.get("r", 8)}
    alphas = _pattern(path, fields, "alpha_pattern") | {"lora_alpha": fields.get("lora_alpha", 8)}
    for name, value in (*ranks.items(), *alphas.items()):
        is_number = isinstance(value, int if name in ranks else (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise WeightsError(f"{path} says {_shown(value)} for {printable(name)}: a number above 0 belongs there.")
    dropout = fields.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise WeightsError(f"{path} says lora_dropout={_shown(dropout)}: a number from 0 to 1 belongs there.")
    return AdapterConfig(
        rank=ranks.pop("r"),
        alpha=alphas.pop("lora_alpha"),
        rslora=bool(fields.get("use_rslora")),
        dropout=float(dropout),
        dora=bool(fields.get("use_dora")),
        ranks=ranks,
        alphas=alphas,
        layers=_layers(path, fields.get("layers_to_transform")),
    )


def adapter_config_fields(lora: LoraConfig, base_name: str) -> dict[str, Any]:
    """Return an adapter_config.json for transformers 5, where router and experts are parameters, not modules."""
    parameters = {"gate": "mlp.gate.weight", "w13": "mlp.experts.gate_up_proj", "w2": "mlp.experts.down_proj"}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": [name for name in lora.matrices if name not in parameters],
        "target_parameters": [parameters[name] for name in lora.matrices if name in parameters],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _matched(patterns: Mapping[str, Any], key: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", key)), default)


def _pattern(path: Path, fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = fields.get(name) or {}
    if not isinstance(found, dict):
        raise WeightsError(f"{path} says {name}={_shown(found)}: an object belongs there.")
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise WeightsError(f"{path} has in {name} {printable(pattern)}, no regular expression: {error}.") from error
    return dict(found)


def _layers(path: Path, found: object) -> tuple[int, ...] | None:
    layers = [found] if isinstance(found, int) else found or None
    if layers is None:
        return None
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise WeightsError(f"{path} says layers_to_transform={_shown(found)}: a list of layers belongs there.")
    return tuple(layers)


def _shown(value: object) -> str:
    return printable(repr(value))[:80]
