"""lm-eval's tasks: its model interface over an Engine, many requests in a forward pass.

The package `lm-eval` (extra `eval`) knows the tasks, their data and their metrics, and asks for likelihoods and texts
(its api/model.py, 0.4.13). It finds models in a table of its own, so that ours is handed to it as an object.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ostro.data.chat import prompt_of
from ostro.data.pieces import Template
from ostro.data.records import Chat, Message
from ostro.errors import ConfigError, Error, RequestError, nearest
from ostro.model.spans import spans_of
from ostro.serve.cache import Branches
from ostro.serve.engine import Answer, Engine
from ostro.serve.sampling import Sampling

_BATCH_TOKENS = 8192  # of one forward pass
_LOGITS_AT_ONCE = 1024  # tokens whose logits, a vocabulary each, are held
_ANSWERS_AT_ONCE = 32
_NEW_TOKENS = 256  # of an answer, where the task does not say (lm-eval's)
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's words, its order
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")

Ids = tuple[int, ...]


@torch.inference_mode()
def score(engine: Engine, groups: Sequence[tuple[Ids, Sequence[Ids]]]) -> list[list[tuple[float, bool]]]:
    """Return for each context, and each continuation of it, its log-likelihood and whether greedy decoding says it.

    All in one forward pass, a context computed once whatever follows it. Contexts have at least one token.
    """
    documents: list[Ids] = []
    parents: list[int | None] = []
    starts: list[int] = []
    rows: list[int] = []  # of which the next token is a continuation's
    labels: list[int] = []
    num_tokens = 0
    for context, continuations in groups:
        parent = len(documents)
        documents.append(context)
        parents.append(None)
        starts.append(0)
        num_tokens += len(context)
        last = num_tokens - 1
        for continuation in continuations:
            labels += continuation
            if len(continuation) > 1:
                documents.append(continuation[:-1])
                parents.append(parent)
                starts.append(len(context))
            rows += [last, *range(num_tokens, num_tokens + len(continuation) - 1)][: len(continuation)]
            num_tokens += max(0, len(continuation) - 1)
    tokens_T = torch.tensor([token for document in documents for token in document], device=engine.device)
    spans = spans_of([len(document) for document in documents], starts=starts, device=engine.device)
    if len(documents) == len(groups):
        x_TD = engine.model(tokens_T, spans)
    else:
        with engine.attending(Branches(parents)):
            x_TD = engine.model(tokens_T, spans)
    scores, greedy = [], []
    for start in range(0, len(rows), _LOGITS_AT_ONCE):
        logits_NV = engine.model.logits(x_TD[rows[start : start + _LOGITS_AT_ONCE]]).float()
        labels_N = torch.tensor(labels[start : start + _LOGITS_AT_ONCE], device=engine.device)
        chosen_N = logits_NV.gather(1, labels_N[:, None])[:, 0]
        scores.append((chosen_N - logits_NV.logsumexp(dim=-1)).double().cpu())
        greedy.append((logits_NV.argmax(dim=-1) == labels_N).cpu())
    lengths = [len(continuation) for _, continuations in groups for continuation in continuations]
    pieces = zip(torch.cat(scores).split(lengths), torch.cat(greedy).split(lengths), strict=True)
    found = iter([(float(each.sum()), bool(same.all())) for each, same in pieces])
    return [[next(found) for _ in continuations] for _, continuations in groups]


class Harness:
    """What lm-eval asks of a model. A request is anything whose `args` are lm-eval's for its kind.

    Texts begin with BOS. With a `template`, conversations are asked with the very tokens that training puts there.
    """

    rank, world_size = 0, 1

    def __init__(self, engine: Engine, template: Template | None = None, batch_size: int = 0) -> None:
        if batch_size < 0:
            raise ConfigError(f"--batch-size {batch_size} is too small: use 1 or more, or 0 for what fits.")
        self.engine, self.template, self._batch_size = engine, template, batch_size
        self._words, self._limit = engine.tokenizer, engine.model.config.max_position_embeddings
        self._rendered: dict[str, tuple[list[int], str, tuple[int, ...]]] = {}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihood in nats, and whether it is what greedy decoding gives, of (context, continuation)."""
        return self._scored([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text, cut into windows as long as the model.

        Each token is predicted once, the first of a window from the last of the one before. As lm-eval's adapter for
        transformers does, a BOS in front of a text is scored too, after another one.
        """
        bos = self._words.bos_token_id
        pairs: list[tuple[Ids, Ids]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            found = list(windows([bos, *self._words.encode(text)], bos, self._limit))
            pairs += found
            owners += [owner] * len(found)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scored(pairs), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text after each (context, settings), up to one of the settings' `until`, which is left out."""
        asked = [self._answer(*request.args) for request in requests]
        order = sorted(range(len(asked)), key=lambda at: -len(asked[at].ids))
        size = self._batch_size or _ANSWERS_AT_ONCE
        texts = [""] * len(asked)
        for start in _shown(range(0, len(order), size), "writing"):
            answers = [asked[at] for at in order[start : start + size]]
            for row, answer in enumerate(answers):
                answer.index = row
            for _ in self.engine.steps(answers, self.engine.cache([len(answer.ids) for answer in answers])):
                pass
            for at, answer in zip(order[start : start + size], answers, strict=True):
                texts[at] = answer.completion().text
        return texts

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, up to an answer, or into one that its last message begins."""
        assert self.template is not None, "lm-eval asks for this only with --apply-chat-template"
        turns = [Message(message["role"], message["content"]) for message in chat_history]  # type: ignore[arg-type]
        begun = "" if add_generation_prompt else turns.pop().content
        prompt = prompt_of(Chat(turns, "a task's conversation"), self.template, self._words)
        # The text comes back as a request's context; what it stands for are tokens, which no text can say for sure.
        self._rendered[prompt.text + begun] = prompt.ids, begun, prompt.end_ids
        return prompt.text + begun

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template's name, for the report."""
        return getattr(self.template, "source", None) or getattr(self.template, "__name__", "")

    @property
    def tokenizer_name(self) -> str:
        """What requests that lm-eval keeps are told apart by."""
        return f"{self._words.name}-{self._words.sha256[:8]}"

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take notice of lm-eval's cache of answers, which is not used."""

    def get_model_info(self) -> dict[str, Any]:
        """Return what a report says of the model."""
        model = self.engine.model
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "model_dtype": str(model.compute_dtype),
        }

    def _context(self, context: str) -> tuple[list[int], str, tuple[int, ...]]:
        """Return the tokens of what is fixed, the text after them, and what ends an answer beside EOS."""
        return self._rendered.get(context, ([self._words.bos_token_id], context, ()))

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Encode both in one, spaces before the cut given to the continuation (lm-eval's TemplateLM._encode_pair)."""
        fixed, text, _ = self._context(context)
        kept = text.rstrip()
        whole = self._words.encode(text + continuation)
        before = self._words.encode(kept) if kept else []
        return (*fixed, *before), tuple(whole[len(before) :])

    def _scored(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """Score pairs of context and continuation, each different one once, long ones first."""
        cut = []
        for context, continuation in pairs:
            if len(continuation) > self._limit:
                raise RequestError(
                    f"a text to score has {len(continuation)} tokens and the model {self._limit} positions: this task "
                    "is for models with more."
                )
            room = self._limit + 1 - len(continuation)  # the last token of all is predicted and not read
            cut.append((context[-room:], continuation))
        groups: dict[Ids, dict[Ids, tuple[float, bool]]] = {}
        for context, continuation in cut:
            groups.setdefault(context, {})[continuation] = 0.0, False
        for batch in _shown(self._batches(groups), "scoring"):
            for context, found in zip(batch, score(self.engine, [(c, list(groups[c])) for c in batch]), strict=True):
                groups[context] = dict(zip(groups[context], found, strict=True))
        return [groups[context][continuation] for context, continuation in cut]

    def _batches(self, groups: Mapping[Ids, Mapping[Ids, Any]]) -> list[list[Ids]]:
        sizes = {context: len(context) + sum(len(each) - 1 for each in groups[context]) for context in groups}
        batches: list[list[Ids]] = []
        filled = 0
        for context in sorted(sizes, key=lambda context: -sizes[context]):
            is_full = len(batches[-1]) >= self._batch_size if self._batch_size and batches else False
            if not batches or is_full or (not self._batch_size and filled + sizes[context] > _BATCH_TOKENS):
                batches.append([])
                filled = 0
            batches[-1].append(context)
            filled += sizes[context]
        return batches

    def _answer(self, context: str, settings: Mapping[str, Any]) -> Answer:
        sampling = sampling_of(settings)
        room = self._limit - sampling.max_new_tokens
        if room < 1:
            raise RequestError(
                f"a task wants answers of {sampling.max_new_tokens} tokens and the model has {self._limit} positions: "
                "it is for models with more."
            )
        fixed, text, end_ids = self._context(context)
        ids = [*fixed, *(self._words.encode(text) if text else [])][-room:]
        return Answer(0, context, ids, self._words, sampling, end_ids=end_ids, continues=False)


def windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[Ids, Ids]]:
    """Yield (context, continuation) so that each token is a continuation's once, `length` inputs at most at a time.

    The first window is predicted from `prefix`. The last one is as long as the others, with more context
    (lm-eval's get_rolling_token_windows and make_disjoint_window, context_len 1).
    """
    padded = [prefix, *ids]
    for start in range(0, len(ids), length):
        stop = min(start + length, len(ids))
        first = max(0, stop - length) if start else 0
        yield tuple(padded[first : start + 1]), tuple(padded[start + 1 : stop + 1])


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """Return how to write what a task's generation settings ask for; RequestError for what cannot be done."""
    given = dict(settings)
    until = given.pop("until", None) or []
    lengths = [given.pop(name, None) for name in _LENGTHS]
    do_sample = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", None) or 0.0)
    if do_sample:
        temperature = temperature or 1.0
    elif do_sample is not None:
        temperature = 0.0
    taken = {name: given.pop(name) for name in _SAMPLING if name in given}
    if given.get("num_beams") == 1:
        del given["num_beams"]
    if given:
        raise RequestError(f"a task's generation_kwargs ask for {', '.join(given)}, which Ostro has not: take it out.")
    return Sampling(
        max_new_tokens=int(next((length for length in lengths if length is not None), _NEW_TOKENS)),
        temperature=temperature,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        **taken,
    )


def run(
    harness: Harness,
    tasks: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Run tasks by name, or those of a folder of YAML files; return lm-eval's results.

    Raises ConfigError where lm-eval is missing or a task is unknown or cannot be run.
    """
    try:
        lm_eval: Any = importlib.import_module("lm_eval")
        manager_of = importlib.import_module("lm_eval.tasks").TaskManager
        importlib.import_module("lm_eval.api.model").LM.register(Harness)  # which it asks of a model
    except ImportError as error:
        raise ConfigError(f"--tasks needs lm-eval ({error}): pip install 'ostro[eval]'.") from None
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise ConfigError(f"--tasks-dir {tasks_dir} is no folder: name one with task files (YAML).")
    manager = manager_of(include_path=None if tasks_dir is None else str(tasks_dir))
    for name in tasks:
        if not manager.match_tasks([name]):
            near = nearest(name, manager.all_tasks)
            raise ConfigError(f"lm-eval has no task {name!r}: its command `lm-eval ls tasks` lists them.{near}")
    try:
        results = lm_eval.simple_evaluate(
            model=harness,
            tasks=manager.match_tasks(list(tasks)),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=harness.template is not None,
            fewshot_as_multiturn=harness.template is not None,
            log_samples=False,
        )
    except Error:
        raise
    except Exception as error:  # a task's data is fetched, and its file and its metrics run, by others
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"lm-eval could not run {', '.join(tasks)} ({type(error).__name__}: {reason}): its data come from the "
            "Hugging Face hub unless the task names files."
        ) from error
    return results


def table(results: Mapping[str, Any]) -> str:
    """Return lm-eval's table of results, in Markdown."""
    make_table = importlib.import_module("lm_eval.utils").make_table
    tables = [make_table(results)] + ([make_table(results, "groups")] if results.get("groups") else [])
    return "\n".join(text.strip() for text in tables)


def _shown(batches: Iterable[Any], what: str) -> Iterable[Any]:
    """Pass batches on under a progress line, on a terminal."""
    from rich import console, progress

    on = console.Console(stderr=True)
    return progress.track(list(batches), what, console=on, transient=True, disable=not sys.stderr.isatty())
