"""What a recipe is as text: YAML with the line of every key, and dotted overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ostro.errors import ConfigError


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Return (dotted key, value) of `a.b=c`, `--a.b=c` and `--a.b c`; values are read as YAML."""
    pairs, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--") or not rest:
                raise ConfigError(f"{word!r} is not an override; write section.key=value.")
            text = rest.pop(0)
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            value = text
        pairs.append((key, value))
    return pairs


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a recipe's fields and where each key stands; ConfigError, with the line, for what is no recipe."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        fields = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where} is not YAML: {getattr(error, 'problem', error)}.") from None
    if fields is None:
        return {}, {}
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds a {type(fields).__name__}; a recipe is a mapping of sections.")
    lines: dict[str, str] = {}

    def visit(node: yaml.Node, name: str, above: tuple[yaml.Node, ...] = ()) -> None:
        if node in above:
            raise ConfigError(f"{path.name}: {name} holds itself; an alias may not stand inside of what it names.")
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                visit(item, f"{name}[{i}]", (*above, node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = f"{name}.{key.value}".removeprefix(".")
                line = f"{path.name} line {key.start_mark.line + 1}"
                if inner in lines:
                    raise ConfigError(f"{line}: {inner} stands there twice, first on {lines[inner]}: leave one out.")
                lines[inner] = line
                visit(value, inner, (*above, node))

    assert node is not None
    for key in fields:
        if not isinstance(key, str):
            raise ConfigError(f"{path} has the key {key!r}; the keys of a recipe are names of sections.")
    visit(node, "")
    return fields, lines


def set_key(fields: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the sections on the way; ConfigError where something else stands."""
    names = key.split(".")
    for i, name in enumerate(names[:-1]):
        below = fields.get(name)
        if name == "model" and i == 0 and isinstance(below, str):
            below = {"preset": below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{key} cannot be set: {'.'.join(names[: i + 1])} is {below!r}, not a section.")
        fields[name] = below
        fields = below
    fields[names[-1]] = value
