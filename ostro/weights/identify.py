"""Which model an unlabelled checkpoint is of: the shipped preset whose sizes its tensors have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights.store import TensorInfo, architecture_difference, depth, pieces
from ostro.weights.stored import SourceOf


def settle(
    path: Path,
    told: ModelConfig | None,
    held: ModelConfig | None,
    infos: Mapping[str, TensorInfo],
    source_of: Callable[[ModelConfig], SourceOf],
    layers: str,
) -> tuple[ModelConfig, list[str]]:
    """Return a checkpoint's model, and what to say about it: as its own configuration `held` has it, as the user
    `told`, or of the preset that fits. WeightsError where the first two contradict each other or all three are silent.
    """
    if held is None and told is None:
        model, preset = identify(path, infos, source_of, layers)
        return model, [f"no configuration beside it: the sizes are those of {preset}"]
    if held is not None and told is not None:
        differing = architecture_difference(held, told)
        if differing is not None:
            name, theirs, ours = differing
            raise WeightsError(
                f"{path} has a configuration with {name}={theirs}, and the model asked for has {ours}: leave the model "
                "out, or remove the configuration if it is wrong."
            )
    model = held or told
    assert model is not None
    return model, []


def identify(
    path: Path, infos: Mapping[str, TensorInfo], source_of: Callable[[ModelConfig], SourceOf], layers: str
) -> tuple[ModelConfig, str]:
    """Return the preset that fits the tensors, and its name; WeightsError unless exactly one does.

    Presets that differ in nothing that is computed with count as one: the first is taken.
    """
    from ostro import config

    presets = {name: config.preset(name) for name in config.preset_names()}
    fitting = {name: model for name, model in presets.items() if _fits(infos, model, source_of(model), layers)}
    names = list(fitting)
    if names and all(architecture_difference(fitting[names[0]], fitting[name]) is None for name in names):
        return fitting[names[0]], names[0]
    sizes = f"{depth(infos, layers)} layers; its first tensor is {_first(infos)}"
    if names:
        raise WeightsError(f"{path} fits the presets {' and '.join(names)}: say which with --model.")
    raise WeightsError(
        f"{path} comes without a configuration and fits no preset ({sizes}): give its own with --model config.json."
    )


def preset_of(model: ModelConfig) -> str | None:
    """Return the preset that a model computes as, or None: whether its sizes alone will tell it."""
    from ostro import config

    same = (name for name in config.preset_names() if architecture_difference(config.preset(name), model) is None)
    return next(same, None)


def _fits(infos: Mapping[str, TensorInfo], model: ModelConfig, source: SourceOf, layers: str) -> bool:
    if depth(infos, layers) != model.num_hidden_layers:
        return False
    one_layer = (p for p in layout.parameters(model) if p.layer in (None, 0))
    sources = (source(parameter, stack) for parameter in one_layer for stack in pieces(parameter))
    return all(s.name in infos and infos[s.name].shape == s.shape for s in sources)


def _first(infos: Mapping[str, TensorInfo]) -> str:
    for name, info in infos.items():
        return f"{name} of {'×'.join(map(str, info.shape))}"
    return "none"
