"""What a run reads: prepared folders as they are, raw text prepared first, and the loader that deals it out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ostro import log
from ostro.config import Config
from ostro.data import shards as token_shards
from ostro.data.chat import fitting
from ostro.data.loader import Loader, packing_of
from ostro.data.prepare import is_of_template, prepared
from ostro.data.shards import Shards
from ostro.data.sources import parse_weight
from ostro.data.tasks import Settings
from ostro.data.tokenizer import Tokenizer
from ostro.errors import ConfigError, DataError
from ostro.model.settings import ModelConfig


def open_loader(config: Config, tokenizer: Tokenizer) -> tuple[Loader, list[Shards]]:
    """Open the training data and deal it out: all of it once an epoch, or each source with its share."""
    data = config.data
    named = [parse_weight(path) for path in data.path]
    weights = [weight for _, weight in named if weight is not None]
    if weights and len(weights) != len(named):
        raise ConfigError("data.path gives some sources a share and others none: write path@share for each.")
    if weights:
        shards = [part for path, _ in named for part in open_data(config, (path,), tokenizer)]
    else:
        shards = open_data(config, data.path, tokenizer)
    loader = Loader(
        shards,
        seq_length=data.seq_length,
        seed=config.train.seed,
        shuffle=data.shuffle,
        packing=packing_of(shards, data.packing),
        overlong=data.overlong,
        pad_token_id=data.pad_token_id,
        weights=weights or None,
        weights_by=data.weights_by,
    )
    for note in loader.notes():
        log.say(note, style="yellow")
    return loader, shards


def open_data(config: Config, paths: tuple[str, ...], tokenizer: Tokenizer) -> list[Shards]:
    """Open prepared folders as they are; prepare raw text first, into the cache."""
    folders = [Path(path) for path in paths if token_shards.is_prepared(path)]
    raw = [path for path in paths if not token_shards.is_prepared(path)]
    if raw:
        log.say(f"preparing {', '.join(raw)} (cached for the next time)")
        cache = token_shards.cache_dir() / "prepared"
        settings = Settings(config.data.kind, config.data.documents, config.data.template, config.data.dedup)
        try:
            folders.append(prepared(raw, cache, tokenizer=tokenizer, settings=settings))
        except DataError as error:
            if not re.search(r" (line|record|row) \d", str(error)):
                raise
            which = " ".join(shlex.quote(path) for path in raw)
            raise DataError(
                f"{error} `ostro prepare {which} --check` names every bad record, and --fix FILE keeps the others."
            ) from None
    opened = [token_shards.open_shards(folder) for folder in folders]
    for folder, shards in zip(folders, opened, strict=True):
        check_data(folder, shards, tokenizer, config.model, config.data.template)
        if _is_chat(shards):
            log.say(_learned(shards, tokenizer))
    return opened


def _is_chat(shards: Shards) -> bool:
    """Whether a template made these tokens: MindRecord's rows have parts that are not learned too, and none."""
    manifest = shards.manifest
    return manifest.num_trained < manifest.num_tokens and any(
        source["kind"] not in ("mindrecord", "megatron") for source in manifest.sources
    )


def _learned(shards: Shards, tokenizer: Tokenizer) -> str:
    manifest = shards.manifest
    text = (
        f"{', '.join(source['path'] for source in manifest.sources[:3])}{' …' * (len(manifest.sources) > 3)}: "
        f"{manifest.num_documents:,} conversations, {manifest.num_tokens:,} tokens, of which "
        f"{manifest.num_trained / manifest.num_tokens:.1%} are learned, what the assistant says; template "
        f"{template_of([shards], tokenizer)}"
    )
    if manifest.num_unlearned:
        text += f"; {manifest.num_unlearned:,} of them teach nothing"
    if manifest.num_repeats:
        text += f"; {manifest.num_repeats:,} that repeat another were dropped"
    return text


def template_of(shards: Sequence[Shards], tokenizer: Tokenizer) -> str:
    """Return the name of the template that conversations in the data were rendered by, "auto" where there are none."""
    for each in shards:
        if _is_chat(each):
            name = each.manifest.settings.get("template") or "auto"
            return fitting(tokenizer) if name == "auto" else name
    return "auto"


def settled(config: Config, shards: Sequence[Shards], tokenizer: Tokenizer) -> Config:
    """Return a run's config with its template by name, as whoever talks to the model has to know it."""
    data = config.data.model_copy(update={"template": template_of(shards, tokenizer)})
    return config.model_copy(update={"data": data}) if data.template != "auto" else config


def check_data(folder: Path, shards: Shards, tokenizer: Tokenizer, model: ModelConfig, template: str = "auto") -> None:
    """Refuse tokens made with another tokenizer or another template, or that the model cannot hold."""
    manifest = shards.manifest
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{folder} was prepared with tokenizer {manifest.tokenizer!r}, not {tokenizer.name!r}: "
            "set data.tokenizer to it, or prepare the data again."
        )
    if not is_of_template(manifest, template, tokenizer):
        raise DataError(
            f"{folder} was prepared with the template {manifest.settings['template']!r}, not {template!r}: set "
            "data.template to it, or prepare the data again."
        )
    if manifest.vocab_size > model.vocab_size:
        raise DataError(
            f"{folder} has token ids up to {manifest.vocab_size - 1} and the model vocab_size={model.vocab_size}: "
            f"set model.vocab_size={manifest.vocab_size} or use the model's own tokenizer."
        )
    for name in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(model, name), getattr(manifest, name)
        if ours != theirs:
            raise DataError(f"{folder} has {name}={theirs} and the model {ours}: they were made for different models.")
