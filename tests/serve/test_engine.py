"""Generation: greedy ids equal transformers', a batch gives each prompt what it gets alone, stops stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from ostro import weights
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import ConfigError, RequestError, WeightsError
from ostro.model.settings import ModelConfig
from ostro.model.spans import spans_of
from ostro.serve.engine import Engine
from ostro.serve.load import load_model, tokenizer_of
from ostro.serve.sampling import Sampling
from ostro.weights.store import RandomReader

PROMPTS = ["import os", "def f(x):\n    return", "é", "The quick brown fox jumps over the lazy dog"]


def config(**changes: int) -> ModelConfig:
    fields = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    return ModelConfig.from_fields({**fields, **changes})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("v1")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[..., Path]:
    def make(**changes: int) -> Path:
        folder = tmp_path_factory.mktemp("model") / "hf"
        weights.convert(RandomReader(config(**changes), 3), folder, to="hf", tokenizer=tokenizer.save)
        return folder

    return make


@pytest.mark.parametrize("window", [None, 6])
def test_greedy_ids_equal_transformers(export: Callable[..., Path], tokenizer: Tokenizer, window: int | None) -> None:
    folder = export(**({"sliding_window": window} if window else {}))
    oracle = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(load_model(folder), tokenizer_of(folder))
    for prompt, ours in zip(PROMPTS, engine.generate(PROMPTS, Sampling(max_new_tokens=40)), strict=True):
        ids = torch.tensor([tokenizer.encode(prompt, bos=True)])
        theirs = oracle.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
        if theirs[-1] == tokenizer.eos_token_id:
            assert ours.finish_reason == "eos"
            theirs.pop()
        assert list(ours.token_ids) == theirs
        assert ours.text == tokenizer.decode(ids[0].tolist() + theirs)[len(prompt) :]


@pytest.mark.parametrize("sampling", [Sampling(20), Sampling(20, temperature=1.0, top_p=0.9, seed=5)])
def test_a_batch_gives_each_prompt_what_it_gets_alone(export: Callable[..., Path], sampling: Sampling) -> None:
    folder = export()
    engine = Engine(load_model(folder), tokenizer_of(folder))
    together = engine.generate(PROMPTS, sampling)
    alone = [engine.generate([prompt], sampling)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({completion.text for completion in together}) > 1


def test_streamed_text_is_the_text_and_experts_are_reported(export: Callable[..., Path]) -> None:
    folder = export()
    engine = Engine(load_model(folder), tokenizer_of(folder))
    parts: dict[int, str] = {}

    def on_text(index: int, text: str) -> None:
        parts[index] = parts.get(index, "") + text

    done = engine.generate(PROMPTS, Sampling(30, temperature=1.5, seed=1), on_text)
    assert [parts[i] for i in range(len(PROMPTS))] == [completion.text for completion in done]
    for completion in done:
        assert len(completion.experts) == len(completion.token_ids)
        assert set(completion.experts) <= set(range(4))
    assert len({expert for completion in done for expert in completion.experts}) > 1


def test_the_model_is_left_as_it_was(export: Callable[..., Path]) -> None:
    folder = export()
    model, tokens = load_model(folder), torch.arange(9)
    before = model(tokens, spans_of([9]))
    Engine(model, tokenizer_of(folder)).generate(PROMPTS[:2], Sampling(3))
    assert torch.equal(model(tokens, spans_of([9])), before)


def test_stop_strings_cut_and_are_never_streamed(export: Callable[..., Path]) -> None:
    folder = export()
    engine = Engine(load_model(folder), tokenizer_of(folder))
    [free] = engine.generate(PROMPTS[:1], Sampling(30))
    stop = free.text[10:14]
    shown: list[str] = []
    [stopped] = engine.generate(PROMPTS[:1], Sampling(30, stop=(stop,)), lambda _, text: shown.append(text))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)] == "".join(shown)


def test_prompts_longer_than_the_prefill_are_computed_in_pieces(
    export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export()
    engine = Engine(load_model(folder), tokenizer_of(folder))
    whole = engine.generate(PROMPTS, Sampling(10))
    monkeypatch.setattr("ostro.serve.engine._PREFILL_TOKENS", 3)
    assert engine.generate(PROMPTS, Sampling(10)) == whole


def test_what_cannot_be_served_is_said(export: Callable[..., Path], tmp_path: Path) -> None:
    folder = export()
    engine = Engine(load_model(folder), tokenizer_of(folder))
    with pytest.raises(RequestError, match=r"prompt 2 has \d+ tokens; with max_new_tokens=120 that is more than the"):
        engine.generate(["a", "b " * 40], Sampling(120))
    with pytest.raises(ConfigError, match=r"dtype 'bf61' is not one of bf16, fp16, fp32. Did you mean 'bf16'\?"):
        load_model(folder, "bf61")
    with pytest.raises(WeightsError, match="has no tokenizer beside its weights"):
        tokenizer_of(tmp_path)
    with pytest.raises(WeightsError, match="the tokenizer has 32000 pieces and the model 100"):
        Engine(load_model(RandomReader(config(vocab_size=100))), tokenizer_of(folder))


def test_bf16_keeps_the_router_in_fp32(export: Callable[..., Path]) -> None:
    model = load_model(export(), "bf16")
    assert {p.dtype for name, p in model.named_parameters() if "gate" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "gate" not in name} == {torch.bfloat16}
    exact = load_model(export(), "fp32")
    sampling = Sampling(8)
    words = load_tokenizer("v1")
    rounded = Engine(model, words).generate(PROMPTS[:2], sampling)
    assert [c.token_ids[0] for c in rounded] == [
        c.token_ids[0] for c in Engine(exact, words).generate(PROMPTS[:2], sampling)
    ]
