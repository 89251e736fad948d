"""The verb migrate: a YAML of MindFormers' Mixtral as a recipe that says of each of its settings what became of it.

`table.TABLE` has a rule for each setting; here the file is read, the rules are asked, and their answers are written.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ostro import log
from ostro.config import Config, build_config, known_keys
from ostro.errors import ConfigError, nearest
from ostro.migrate.absent import absent
from ostro.migrate.rules import Fate, Given, Kind, Leaf
from ostro.migrate.table import RULES
from ostro.overrides import read_yaml, set_key

SECTIONS = ("model", "weights", "data", "train", "optim", "moe", "parallel", "checkpoint", "run", "profile")
_HEADINGS: dict[Kind, str] = {
    "changed": "Means something else here:",
    "inert": "Has no effect in MindFormers:",
    "here": "Needs no setting here:",
    "none": "Has no counterpart here:",
}
_COLUMN = 40
_TASKS = ("train_dataset_task.dataset_config", "eval_dataset_task.dataset_config")
_SPELLINGS = {"CheckpointMointor": "CheckpointMonitor"}  # r1.1 to r1.3

# What predict and eval make of a setting, by how the table's name for it begins.
_TRAINING = Fate("inert", "read in training alone")
_UNTRAINED: dict[str, Fate] = {
    "parallel": Fate("none", "generation and evaluation run in one process"),
    "moe_config.": Fate("here", "where nothing is trained, nothing is dropped or balanced"),
    **dict.fromkeys(
        (
            "seed",
            "runner_",
            "optimizer.",
            "lr_schedule.",
            "train_dataset",
            "recompute_config.",
            "callbacks[",
            "resume_",
        ),
        _TRAINING,
    ),
}
_OPTIONS = {"train.dtype": "--dtype", "data.tokenizer": "--tokenizer", "data.seq_length": "--seq-length"}


def migrate(file: Path, out: Path | None, say: Callable[[str], None]) -> None:
    """Print a MindFormers YAML as a recipe, or write it; ConfigError for what is not understood."""
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists: choose another name.")
    recipe = translate(file)
    if out is None:
        say(recipe.rstrip("\n"))
        return
    log.write_text(out, recipe)
    say(f"wrote {out}; next: ostro plan {shlex.quote(str(out))}")


def translate(file: Path) -> str:
    """Return the recipe, in which each setting of the file is named once, as `name = value`."""
    fields, lines = read_yaml(file)
    named = list(_leaves(fields, "", "", {}))
    given = _given(named, file)
    fates: list[tuple[Leaf, Fate]] = []
    for leaf, pattern in named:
        try:
            fates.append((leaf, _in_mode(_rule(leaf, pattern)(leaf, given), pattern, given)))
        except ConfigError as error:
            raise ConfigError(f"{lines.get(leaf.name, file.name)}: {error}") from None
    return _rendered(file, fates, given)


def _leaves(value: Any, name: str, pattern: str, seen: dict[int, str]) -> Iterator[tuple[Leaf, str]]:
    """Yield each setting with the table's name for it; an alias (`*train_dataset`) that has a rule is one setting."""
    is_list = isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    if pattern in RULES and isinstance(value, dict) and id(value) in seen:
        yield Leaf(name, f"*{seen[id(value)]}"), pattern
    elif isinstance(value, dict) and value:
        seen[id(value)] = name
        # What a task says of its data set counts as said of the data set.
        inner = pattern.replace("_task.dataset_config", "") if pattern in _TASKS else pattern
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}".lstrip("."), f"{inner}.{key}".lstrip("."), seen)
    elif is_list:
        for i, item in enumerate(value):
            kind = str(item.get("type"))
            yield from _leaves(item, f"{name}[{i}]", f"{pattern}[{_SPELLINGS.get(kind, kind)}]", seen)
    else:
        yield Leaf(name, value), pattern


def _given(named: list[tuple[Leaf, str]], file: Path) -> Given:
    given: dict[str, Any] = {}
    names: dict[str, str] = {}
    for leaf, pattern in named:
        if pattern in given and given[pattern] != leaf.value:
            raise ConfigError(
                f"{file}: {names[pattern]}={given[pattern]!r} and {leaf.name}={leaf.value!r} disagree: leave one out."
            )
        given[pattern], names[pattern] = leaf.value, leaf.name
    if not any(pattern.startswith("model.model_config.") for pattern in given):
        raise ConfigError(f"{file} has no model.model_config: it is no YAML of MindFormers.")
    if given.get("moe_config.expert_num", 1) == 1:
        raise ConfigError(f"{file} has no moe_config.expert_num above 1: its model is a Llama and no Mixtral.")
    return given


def _rule(leaf: Leaf, pattern: str) -> Callable[[Leaf, Given], Fate]:
    rule = RULES.get(pattern) or RULES.get(f"{pattern.rpartition('.')[0]}.*")
    if rule is not None:
        return rule
    if leaf.value in (None, {}, []) and any(known.startswith((f"{pattern}.", f"{pattern}[")) for known in RULES):
        return lambda leaf, given: Fate("here", "empty")
    raise ConfigError(f"{leaf.name}={leaf.value!r} is not understood.{nearest(pattern, RULES)}")


def _in_mode(fate: Fate, pattern: str, given: Given) -> Fate:
    """Return what a setting means for a model that is not trained, if the file is for that."""
    mode = given.get("run_mode", "train")
    if mode in ("train", "finetune") or (fate.kind == "key" and fate.key.startswith(("model.", "weights."))):
        return fate
    if fate.key in _OPTIONS and (mode == "eval" or fate.key != "data.seq_length"):
        return Fate("option", fate.words, _OPTIONS[fate.key], fate.value)
    found = next((_UNTRAINED[prefix] for prefix in _UNTRAINED if pattern.startswith(prefix)), fate)
    return _TRAINING if found.kind == "key" else found


def _rendered(file: Path, fates: list[tuple[Leaf, Fate]], given: Given) -> str:
    keys = _merged(fates)
    for name, (value, words) in absent(given, set(keys), file.stem).items():
        keys[name] = (value, [words])
    config = _checked(keys)
    lines = [
        f"# From {file.name} of MindFormers. Each of its {len(fates)} settings is named once, as `name = value`:",
        "# beside the key that took its place, or below, with the reason why none did.",
    ]
    if "run.dir" in keys:
        lines.append(f"# For {config.parallel.degrees().num_ranks} processes: see --nproc-per-node and --nnodes.")
    for section in SECTIONS:
        inside = {name.partition(".")[2]: found for name, found in keys.items() if name.startswith(f"{section}.")}
        lines += [f"{section}:"] if inside else []
        lines += [_line(name, *found) for name, found in _ordered(section, inside)]
    lines += _options(fates, given, keys)
    for kind, heading in _HEADINGS.items():
        lines += _tail(heading, [(leaf, fate) for leaf, fate in fates if fate.kind == kind])
    return "\n".join(lines) + "\n"


def _checked(keys: Mapping[str, tuple[Any, list[str]]]) -> Config:
    """Return the config that the recipe will be; ConfigError, with the setting of the YAML, for what Ostro refuses."""
    fields: dict[str, Any] = {}
    for name, (value, _) in keys.items():
        set_key(fields, name, value)
    return build_config(fields, {name: comments[0].partition(":")[0] for name, (_, comments) in keys.items()})


def _merged(fates: list[tuple[Leaf, Fate]]) -> dict[str, tuple[Any, list[str]]]:
    """Return value and comments of each key of the recipe; several settings may say one key, and then agree."""
    keys: dict[str, tuple[Any, list[str]]] = {}
    for leaf, fate in fates:
        if fate.kind != "key":
            continue
        value, comments = keys.setdefault(fate.key, (fate.value, []))
        if value != fate.value:
            raise ConfigError(
                f"{leaf.name}={leaf.value!r} makes {fate.key}={fate.value!r}, and others make it {value}."
            )
        comments.append(_shown(leaf) + (f": {fate.words}" if fate.words else ""))
    return keys


def _ordered(section: str, inside: Mapping[str, Any]) -> list[tuple[str, Any]]:
    known = known_keys(f"{section}.")
    return sorted(inside.items(), key=lambda item: known.index(item[0]) if item[0] in known else len(known))


def _line(name: str, value: Any, comments: list[str]) -> str:
    text = yaml.safe_dump({name: value}, default_flow_style=True, width=10**9, allow_unicode=True).strip()[1:-1]
    return f"  {text:<{_COLUMN}} # {'; '.join(comments)}"


def _options(fates: list[tuple[Leaf, Fate]], given: Given, keys: Mapping[str, tuple[Any, list[str]]]) -> list[str]:
    """Return the command that the settings of generation make, and these settings."""
    options = [(leaf, fate) for leaf, fate in fates if fate.kind == "option"]
    if not options:
        return []
    is_evaluation, is_trained = given.get("run_mode") == "eval", "run.dir" in keys
    words = {fate.key: shlex.quote(str(fate.value)) for _, fate in options}
    data = words.pop("DATA", "DATA")
    flags = [f"{key} {value}" for key, value in words.items() if not is_evaluation or key in _OPTIONS.values()]
    model = shlex.quote(str(keys.get("run.dir" if is_trained else "weights.path", ("",))[0] or "MODEL"))
    verb = f"evaluate {model} {data}" if is_evaluation else f'generate {model} "PROMPT"'
    lines = ["", _printable(f"# ostro {verb} {' '.join(flags)}")]
    for leaf, fate in options:
        lines.append(f"#   {_shown(leaf)}" + (f": {fate.words}" if fate.words else ""))
    return lines


def _tail(heading: str, found: list[tuple[Leaf, Fate]]) -> list[str]:
    by_reason: dict[str, list[Leaf]] = {}
    for leaf, fate in found:
        by_reason.setdefault(fate.words, []).append(leaf)
    lines = ["", f"# {heading}"] if found else []
    for reason, leaves in by_reason.items():
        lines.append(f"#   {reason}")
        lines += [f"#     {_shown(leaf)}" for leaf in leaves]
    return lines


def _shown(leaf: Leaf) -> str:
    return f"{leaf.name} = {_printable(json.dumps(leaf.value, ensure_ascii=False, default=str))}"


def _printable(text: str) -> str:
    """Return a text that cannot leave its line: YAML ends one at more characters than newlines."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
