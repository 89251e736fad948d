"""What became of each setting of a MindFormers YAML for Mixtral (r1.1 to r1.7): one table, from its key to a rule.

A rule looks at a setting, and at the others where it must, and says its fate: the key of a recipe that takes its
place, or why none does. A value whose meaning Ostro does not have is a ConfigError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ostro.errors import ConfigError, nearest

Kind = Literal["key", "option", "changed", "inert", "here", "none"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A setting: its dotted name as the file has it, and its value."""

    name: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Fate:
    """What becomes of a setting: `key` of a recipe (or option of `ostro generate`) gets `value`, or `words` say why.

    Kinds without a key: changed (means something else here), inert (has no effect in MindFormers), here (needs no
    setting of Ostro's), none (has no counterpart).
    """

    kind: Kind
    words: str = ""
    key: str = ""
    value: Any = None


Given = Mapping[str, Any]  # all settings by the table's names
Rule = Callable[[Leaf, Given], Fate]
Convert = Callable[[Leaf], Any]


def number(leaf: Leaf) -> float:
    """Return a number; YAML reads 1e-5 as text."""
    try:
        if not isinstance(leaf.value, bool):
            return float(leaf.value)
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"{leaf.name}={leaf.value!r} must be a number.")


def whole(leaf: Leaf) -> int:
    """Return a whole number."""
    value = number(leaf)
    if not value.is_integer():
        raise ConfigError(f"{leaf.name}={leaf.value!r} must be a whole number.")
    return int(value)


def switch(leaf: Leaf) -> bool:
    """Return true or false."""
    if not isinstance(leaf.value, bool):
        raise ConfigError(f"{leaf.name}={leaf.value!r} must be True or False.")
    return leaf.value


def count(given: Given, name: str, default: int = 1) -> int:
    """Return a whole number among the settings."""
    return whole(Leaf(name, given.get(name, default)))


def path(leaf: Leaf) -> str | None:
    return str(leaf.value) if leaf.value else None


def paths(leaf: Leaf) -> list[str]:
    values = leaf.value if isinstance(leaf.value, list) else [leaf.value]
    return [str(value) for value in values if value]


def key(name: str, words: str = "", convert: Convert | None = None) -> Rule:
    return lambda leaf, given: Fate("key", words, name, convert(leaf) if convert else leaf.value)


def changed(words: str) -> Rule:
    return lambda leaf, given: Fate("changed", words)


def inert(words: str) -> Rule:
    return lambda leaf, given: Fate("inert", words)


def here(words: str) -> Rule:
    return lambda leaf, given: Fate("here", words)


def none(words: str) -> Rule:
    return lambda leaf, given: Fate("none", words)


def only(values: tuple[Any, ...], rule: Rule, otherwise: str) -> Rule:
    """Return `rule` for these values; another is refused, for `otherwise`."""

    def checked(leaf: Leaf, given: Given) -> Fate:
        if leaf.value not in values:
            shown = ", ".join(str(value) for value in values)
            close = nearest(str(leaf.value), [value for value in values if isinstance(value, str)])
            raise ConfigError(f"{leaf.name}={leaf.value!r} cannot be had: {otherwise}; known: {shown}.{close}")
        return rule(leaf, given)

    return checked


def word(name: str, words: Mapping[str, str], otherwise: str) -> Rule:
    """Return a rule that translates a word; another is refused, for `otherwise`."""
    return only(tuple(words), lambda leaf, given: Fate("key", "", name, words[leaf.value]), otherwise)


def when(name: str, value: Any, rule: Rule, otherwise: Rule) -> Rule:
    """Return `rule` while another setting has this value, else `otherwise`; an absent setting is None."""
    return lambda leaf, given: (rule if given.get(name) == value else otherwise)(leaf, given)


# Rules that need a few lines.


def is_dropless(given: Given) -> bool:
    """Return whether MindFormers drops nothing in training."""
    factor = number(Leaf("moe_config.capacity_factor", given.get("moe_config.capacity_factor", 1.1)))
    return factor <= 0 or given.get("moe_config.use_gmm") is True


def capacity(leaf: Leaf, given: Given) -> Fate:
    words = "nothing is dropped, as there" if is_dropless(given) else ""
    return Fate("key", words, "moe.capacity_factor", None if is_dropless(given) else number(leaf))


def drop(leaf: Leaf, given: Given) -> Fate:
    if is_dropless(given):
        return Fate("inert", "nothing is dropped")
    return Fate("key", "who is served first", "moe.drop", "token" if switch(leaf) else "choice")


def balance(leaf: Leaf, given: Given) -> Fate:
    words = "half of it in Ostro's unit; there it was never added to the loss, which 0 repeats"
    return Fate("key", words, "moe.router_aux_loss_coef", number(leaf) / 2)


def z_loss(leaf: Leaf, given: Given) -> Fate:
    words = "there it was never added to the loss of Mixtral, which 0 repeats"
    return Fate("key", words, "moe.z_loss_coef", number(leaf))


def data_parallel(leaf: Leaf, given: Given) -> Fate:
    degree, share = whole(leaf), shards(given)
    if share == 1:
        return Fate("key", "without its parallel optimizer they are copies", "parallel.dp", degree)
    if is_sharded(given):
        return Fate("key", "with its parallel optimizer they share", "parallel.fsdp", share)
    return Fate("key", "experts lie within ranks that share, so these do", "parallel.fsdp", share)


def is_sharded(given: Given) -> bool:
    """Return whether data ranks share what they hold."""
    return given.get("parallel.enable_parallel_optimizer") is True


def shards(given: Given) -> int:
    """Return over how many of the data ranks parameters are sharded."""
    degree = count(given, "parallel_config.data_parallel")
    size = count(given, "parallel.parallel_optimizer_config.optimizer_weight_shard_size", -1)
    if not is_sharded(given):
        return min(degree, count(given, "parallel_config.expert_parallel"))
    return size if size > 0 else degree


def shard_size(leaf: Leaf, given: Given) -> Fate:
    if not is_sharded(given) or whole(leaf) <= 0:
        return Fate("inert", "its parallel optimizer is off, or shards over all data ranks")
    return Fate("key", "so many share, the others replicate", "parallel.fsdp", shards(given))


def sequence_parallel(leaf: Leaf, given: Given) -> Fate:
    if count(given, "parallel_config.model_parallel") == 1:
        return Fate("inert", "there is no tensor parallel")
    if switch(leaf):
        return Fate("here", "comes with tp")
    return Fate("changed", "comes with tp here, always: same results, but capacity counts in smaller groups")


def micro_batches(leaf: Leaf, given: Given) -> Fate:
    if count(given, "parallel_config.pipeline_stage") == 1:
        return Fate("inert", "there is no pipeline")
    factor = count(given, "micro_batch_interleave_num")
    words = "times the interleaved parts" if factor > 1 else ""
    return Fate("key", words, "parallel.micro_batch_num", whole(leaf) * factor)


def interleave(leaf: Leaf, given: Given) -> Fate:
    if whole(leaf) == 1:
        return Fate("here", "1 changes nothing")
    return Fate("changed", "a factor of parallel.micro_batch_num and train.global_batch_sequences")


def accumulation(leaf: Leaf, given: Given) -> Fate:
    if count(given, "parallel_config.pipeline_stage") > 1:
        return Fate("inert", "a pipeline has micro-batches instead")
    return Fate("changed", "a factor of train.global_batch_sequences")


def stage_layers(leaf: Leaf, given: Given) -> Fate:
    if leaf.value == 0:
        return Fate("here", "the stages have equally many layers")
    stages = max(1, count(given, "parallel_config.pipeline_stage"))
    each = count(given, "model.model_config.num_layers", 32) // stages
    offsets = leaf.value
    if not isinstance(offsets, list) or len(offsets) != stages or not all(type(n) is int for n in offsets):
        raise ConfigError(f"{leaf.name}={offsets!r} must be 0, or a list of a number for each of {stages} stages.")
    return Fate("key", "", "parallel.stage_layers", [each + more for more in offsets])


def recompute(leaf: Leaf, given: Given) -> Fate:
    if isinstance(leaf.value, list):
        return Fate("key", "there for some layers only, here for all", "train.recompute", "full")
    found = "selective" if given.get("recompute_config.select_recompute") else "none"
    return Fate("key", "", "train.recompute", "full" if switch(leaf) else found)


def select_recompute(leaf: Leaf, given: Given) -> Fate:
    if not leaf.value or given.get("recompute_config.recompute"):
        return Fate("inert", "off, or whole layers are made again anyway")
    words = "there by names of operators; here what lies inside the experts"
    return Fate("key", words, "train.recompute", "selective")


def initial_dtype(leaf: Leaf, given: Given) -> Fate:
    if leaf.value == "float32":
        return Fate("here", "weights are kept and updated in fp32")
    return Fate(
        "changed",
        "there weights were kept in it, too; here in fp32, unless train.master_dtype is bf16",
    )


def repeat(leaf: Leaf, given: Given) -> Fate:
    return Fate("key", "passes over the data", "train.epochs", num_epochs(given))


def epochs(leaf: Leaf, given: Given) -> Fate:
    return Fate("key", "", "train.epochs", num_epochs(given))


def num_epochs(given: Given) -> int:
    """Return how often training goes through the data."""
    return count(given, "runner_config.epochs") * count(given, "train_dataset.repeat")


def stop(leaf: Leaf, given: Given) -> Fate:
    if whole(leaf) <= 0:
        return Fate("inert", "0 stops nowhere")
    return Fate("key", "", "train.steps", whole(leaf))


def rate_of_optimizer(leaf: Leaf, given: Given) -> Fate:
    if "lr_schedule.type" in given:
        return Fate("inert", "the schedule's rate takes its place")
    return Fate("key", "", "optim.learning_rate", number(leaf))


def betas(leaf: Leaf, given: Given) -> Fate:
    if isinstance(leaf.value, list):
        return Fate("key", "", "optim.betas", [number(Leaf(leaf.name, value)) for value in leaf.value])
    pair = [given.get("optimizer.beta1", 0.9), given.get("optimizer.beta2", 0.999)]
    return Fate("key", "", "optim.betas", [number(Leaf(leaf.name, value)) for value in pair])


def warmup_steps(leaf: Leaf, given: Given) -> Fate:
    total = count(given, "lr_schedule.total_steps", -1)
    if "lr_schedule.warmup_ratio" in given:
        return Fate("inert", "the ratio takes its place")
    if total < 1:
        raise ConfigError(
            f"{leaf.name}={leaf.value!r} is a number of steps, and without total_steps nothing says which share of "
            "them it is: write warmup_ratio in its place."
        )
    return Fate("key", "", "optim.warmup_ratio", whole(leaf) / total)


def clip(leaf: Leaf, given: Given) -> Fate:
    if switch(leaf):
        return Fate("here", "gradients are clipped, to a norm of 1 unless optim.max_grad_norm says another")
    return Fate("key", "never reached", "optim.max_grad_norm", 1e9)


def loss_scale(name: str) -> Rule:
    def scaled(leaf: Leaf, given: Given) -> Fate:
        if given.get("model.model_config.compute_dtype", "float16") != "float16":
            return Fate("here", "bf16 and fp32 need no loss scale")
        return Fate("key", "", name, whole(leaf))

    return scaled


def eval_data(leaf: Leaf, given: Given) -> Fate:
    if given.get("run_mode") == "eval":
        return Fate("option", "", "DATA", " ".join(paths(leaf)))
    if given.get("do_eval") is not True:
        return Fate("inert", "do_eval is off")
    return Fate("key", "", "data.eval_path", paths(leaf))


def eval_every(leaf: Leaf, given: Given) -> Fate:
    if given.get("do_eval") is not True or whole(leaf) < 1:
        return Fate("inert", "do_eval is off, or −1: never")
    return Fate("key", "", "train.eval_every", whole(leaf))


def eval_epochs(leaf: Leaf, given: Given) -> Fate:
    if given.get("do_eval") is not True or whole(leaf) < 1:
        return Fate("inert", "do_eval is off, or −1: never")
    return Fate("changed", "evaluations are counted in steps: set train.eval_every")


def profile(leaf: Leaf, given: Given) -> Fate:
    if given.get("profile") is not True:
        return Fate("here", "nothing is profiled; profile.steps does")
    first, last = count(given, "profile_start_step"), count(given, "profile_stop_step", 10)
    return Fate("key", "", "profile.steps", f"{first}..{last}")


def weights(leaf: Leaf, given: Given) -> Fate:
    """Return the fate of the two names of a checkpoint, of which load_checkpoint comes first."""
    named = given.get("load_checkpoint") or given.get("model.model_config.checkpoint_name_or_path")
    if named and leaf.value != named:
        return Fate("inert", "another setting names the checkpoint")
    return Fate("key", "" if named else "null draws random weights", "weights.path", path(leaf))


def vocabulary(leaf: Leaf, given: Given) -> Fate:
    file = str(leaf.value or "")
    if not file or "..." in file or file.startswith("path/to"):
        return Fate("here", "a placeholder; v1, which comes with Ostro, is Mixtral-8x7B's")
    return Fate("key", "", "data.tokenizer", file)


def temperature(leaf: Leaf, given: Given) -> Fate:
    samples = switch(leaf)
    heat = number(Leaf("temperature", given.get("model.model_config.temperature", 1.0)))
    return Fate("option", "sampled" if samples else "greedy", "--temperature", heat if samples else 0)


def option(name: str, convert: Convert, words: str = "") -> Rule:
    return lambda leaf, given: Fate("option", words, name, convert(leaf))


def of_sampling(name: str, convert: Convert, words: str = "") -> Rule:
    """Return the rule of an option that greedy generation does not read."""
    greedy = inert("nothing is sampled")
    return when("model.model_config.do_sample", False, greedy, option(name, convert, words))
