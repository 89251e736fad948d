"""Prompts in, text out: prefill, decode, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ostro.data.tokenizer import Tokenizer
from ostro.errors import RequestError, WeightsError
from ostro.model.mixtral import Mixtral
from ostro.model.spans import spans_of
from ostro.serve.cache import Branches, KVCache
from ostro.serve.sampling import Sampling, next_token

# Prompt tokens computed at once; bounds the memory of a long prefill.
_PREFILL_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer: its text, its token ids, why it ended (`eos`, `length` or `stop`), and which expert of the last
    layer weighed most where each token was chosen."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    experts: tuple[int, ...]


class Engine:
    """Generates with one model; `generate` may be called any number of times."""

    def __init__(self, model: Mixtral, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise WeightsError(
                f"the tokenizer has {tokenizer.vocab_size} pieces and the model {model.config.vocab_size}: "
                "they do not belong together."
            )
        self.model, self.tokenizer = model, tokenizer
        self.device = model.head_weight.device

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Complete each prompt; `on_text(prompt index, new text)` is called as text becomes certain."""
        sampling = sampling or Sampling()
        answers = [self._start(i, prompt, sampling) for i, prompt in enumerate(prompts)]
        cache = self.cache([len(answer.ids) + sampling.max_new_tokens for answer in answers])
        for index, text in self.steps(answers, cache):
            if text and on_text is not None:
                on_text(index, text)
        return [answer.completion() for answer in answers]

    def _start(self, index: int, prompt: str, sampling: Sampling) -> Answer:
        ids = self.tokenizer.encode(prompt, bos=True)
        limit = self.model.config.max_position_embeddings
        if len(ids) + sampling.max_new_tokens > limit:
            raise RequestError(
                f"prompt {index + 1} has {len(ids)} tokens; with max_new_tokens={sampling.max_new_tokens} that is more "
                f"than the model's {limit} positions: shorten one of them."
            )
        return Answer(index, prompt, ids, self.tokenizer, sampling)

    def cache(self, capacities: Sequence[int]) -> KVCache:
        """Return room for the keys and values of sequences of so many tokens."""
        return KVCache(self.model.config, capacities, self.model.compute_dtype, self.device)

    @torch.inference_mode()
    def steps(self, answers: Sequence[Answer], cache: KVCache) -> Iterator[tuple[int, str]]:
        """Go on with every answer until its end, yielding its index and what is certain of its text.

        An answer's index is its sequence in `cache`, and what the cache has of it from before is not computed again.
        Whoever stops early leaves a cache that can be gone on with.
        """
        for answer in answers:
            first = cache.rewind(answer.index, answer.ids)
            last = first + (len(answer.ids) - 1 - first) // _PREFILL_TOKENS * _PREFILL_TOKENS
            for start in range(first, last, _PREFILL_TOKENS):
                self._forward(cache, [answer.index], [answer.ids[start : start + _PREFILL_TOKENS]])
            logits, experts = self._forward(cache, [answer.index], [answer.ids[last:]])
            yield answer.index, answer.add(logits[0], int(experts[0]))
        while running := [answer for answer in answers if not answer.finish_reason]:
            logits, experts = self._forward(cache, [a.index for a in running], [a.ids[-1:] for a in running])
            for row, answer in enumerate(running):
                yield answer.index, answer.add(logits[row], int(experts[row]))

    @contextlib.contextmanager
    def attending(self, cache: KVCache | Branches) -> Iterator[None]:
        """Have the cache stand in for every layer's `attend`, and put the model back as it was."""
        before = {layer: block.self_attn.attend for layer, block in self.model.blocks.items()}
        try:
            for layer, block in self.model.blocks.items():
                block.self_attn.attend = functools.partial(cache.attend, layer)
            yield
        finally:
            for layer, block in self.model.blocks.items():
                block.self_attn.attend = before[layer]

    def _forward(self, cache: KVCache, sequences: list[int], pieces: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Run the new tokens of some sequences; return the last token's logits [n, V] and best last-layer expert."""
        config = self.model.config
        tokens_T = torch.tensor([i for piece in pieces for i in piece], device=self.device)
        spans = spans_of(
            [len(piece) for piece in pieces],
            starts=[len(cache.ids[sequence]) for sequence in sequences],
            experts_LTA=torch.empty(
                config.num_hidden_layers,
                len(tokens_T),
                config.num_experts_per_tok,
                dtype=torch.int64,
                device=self.device,
            ),
            device=self.device,
        )
        cache.begin(sequences)
        with self.attending(cache):
            x_TD = self.model(tokens_T, spans)
        cache.advance(pieces)
        last = spans.document_starts[1:].long() - 1
        assert spans.experts_LTA is not None
        return self.model.logits(x_TD[last]).cpu(), spans.experts_LTA[-1, last, 0].cpu()


class Answer:
    """One prompt's growing answer: tokens, certain text, and whether it has ended.

    It ends at one of `end_ids`, by default EOS. With `continues` its text is what comes after the prompt's, a space at
    its beginning included; without, it is a text of its own.
    """

    def __init__(
        self,
        index: int,
        prompt: str,
        ids: Sequence[int],
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        end_ids: Sequence[int] = (),
        continues: bool = True,
    ) -> None:
        self.index, self.prompt, self.ids = index, prompt, list(ids)
        self.num_prompt_tokens = len(ids)
        self.finish_reason = ""
        self._end_ids = {tokenizer.eos_token_id, *end_ids}
        self._sampling, self._generator = sampling, torch.Generator().manual_seed(sampling.seed)
        self._stream = tokenizer.stream()
        for token in ids if continues else ():  # whether it begins with a space depends on what stands before it
            self._stream.push(token)
        self._text = ""
        self._shown = 0
        self._experts: list[int] = []

    def add(self, logits_V: Tensor, expert: int) -> str:
        """Choose the next token from its logits; return the text that is now certain and was not before."""
        token = next_token(logits_V, torch.tensor(self.ids), self._sampling, self._generator)
        if token in self._end_ids:
            self.finish_reason = "eos"
        else:
            self.ids.append(token)
            self._experts.append(expert)
            self._text += self._stream.push(token)
            if len(self.ids) - self.num_prompt_tokens == self._sampling.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            self._text += self._stream.flush()
        cut = min((at for stop in self._sampling.stop if (at := self._text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self._text, self.finish_reason = self._text[:cut], "stop"
        return self._certain()

    def _certain(self) -> str:
        # Text that may yet turn out to be the beginning of a stop string is held back.
        held = 0
        if not self.finish_reason:
            for stop in self._sampling.stop:
                for n in range(min(len(stop) - 1, len(self._text)), held, -1):
                    if self._text.endswith(stop[:n]):
                        held = n
                        break
        end = max(self._shown, len(self._text) - held)
        new = self._text[self._shown : end]
        self._shown = end
        return new

    def completion(self) -> Completion:
        """Return what there is of it so far."""
        ids = tuple(self.ids[self.num_prompt_tokens :])
        return Completion(self.prompt, self._text, ids, self.finish_reason, tuple(self._experts))
