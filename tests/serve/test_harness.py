"""lm-eval's model interface against direct computations; its package is not needed (tests/interop/lm_eval_side.py)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ostro.cli import main
from ostro.data import chat as templates
from ostro.data.records import Chat, Message
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import ConfigError, RequestError
from ostro.model.settings import ModelConfig
from ostro.model.spans import spans_of
from ostro.serve.engine import Engine
from ostro.serve.harness import Harness, run, sampling_of, score, windows
from ostro.serve.load import load_model
from ostro.serve.sampling import Sampling
from ostro.weights.store import RandomReader

POSITIONS = 24
LONG = "one two three four five six seven eight nine ten eleven twelve " * 2 + "end"  # longer than the model


def engine_of(**changes: Any) -> Engine:
    fields = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
        **changes,
    }
    return Engine(load_model(RandomReader(ModelConfig.from_fields(fields), 3), "fp32"), load_tokenizer("v1"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of()


def requests(*args: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in args]


def direct(engine: Engine, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """One forward pass of one document, as long as the model at most, cut from the left."""
    ids = torch.tensor([*context, *continuation][-(POSITIONS + 1) :])
    with torch.no_grad():
        logits = engine.model.logits(engine.model(ids[:-1], spans_of([len(ids) - 1])))[-len(continuation) :]
    labels = ids[-len(continuation) :]
    value = logits.log_softmax(-1).gather(1, labels[:, None]).sum()
    return float(value), bool((logits.argmax(-1) == labels).all())


@pytest.mark.parametrize(("window", "batch_size"), [(None, 0), (5, 2)])
def test_likelihoods_are_those_of_each_alone(window: int | None, batch_size: int) -> None:
    engine = engine_of(**({"sliding_window": window} if window else {}))
    words = engine.tokenizer
    asked = [
        ("The wind is", " warm and damp"),
        ("The wind is", " cold"),
        ("The wind is ", "warm and damp"),  # the space goes to the continuation
        ("The wind is", " warm and damp"),  # twice
        ("Sailors drew", " all eight of them on the compass rose"),
        ("", "alone"),
        (LONG, " and the last ones of all"),
        (LONG, " x"),
    ]
    found = Harness(engine, batch_size=batch_size).loglikelihood(requests(*asked))
    for (context, continuation), (value, is_greedy) in zip(asked, found, strict=True):
        before = words.encode(context.rstrip(), bos=True) if context else [1]
        whole = words.encode(context + continuation, bos=True)
        alone, flag = direct(engine, before, whole[len(before) :])
        assert value == pytest.approx(alone, abs=2e-4)
        assert is_greedy == flag
    assert found[0] == found[3]
    assert found[0] == pytest.approx(found[2])
    assert len(words.encode(asked[6][0] + asked[6][1], bos=True)) > POSITIONS + 1
    best = int(engine.model.logits(engine.model(torch.tensor([1]), spans_of([1])))[0].argmax())
    [flags] = score(engine, [((1,), [(best,), (best, 5), (5, 6), ()])])
    assert [flag for _, flag in flags] == [direct(engine, [1], each)[1] for each in ([best], [best, 5], [5, 6])] + [
        True
    ]
    assert flags[0][1]
    with pytest.raises(RequestError, match=r"a text to score has \d+ tokens and the model 24 positions"):
        Harness(engine).loglikelihood(requests(("a", " b c d e" * 10)))


def test_whole_texts_are_scored_in_windows(engine: Engine) -> None:
    texts = ["short", "Ostro is the south wind of the Mediterranean, warm and damp, and it often brings rain. " * 3]
    found = Harness(engine).loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, value in zip(texts, found, strict=True):
        ids = engine.tokenizer.encode(text, bos=True)
        pairs = list(windows(ids, 1, POSITIONS))
        assert value == pytest.approx(sum(direct(engine, *pair)[0] for pair in pairs), rel=1e-5)
    assert len(pairs) > 2


@given(count=st.integers(1, 40), length=st.integers(1, 9))
def test_windows_predict_each_token_once_with_what_stands_before_it(count: int, length: int) -> None:
    ids = list(range(1, count + 1))
    pairs = list(windows(ids, 0, length))
    assert [token for _, continuation in pairs for token in continuation] == ids
    for context, continuation in pairs:
        assert context
        assert len(context) + len(continuation) - 1 == min(length, count)
        assert list(context + continuation) == list(range(context[0], continuation[-1] + 1))


def test_texts_are_what_generation_gives_and_end_where_they_should(engine: Engine) -> None:
    prompts = ["The wind", "Sailors drew all eight of them", "one"]
    free = Harness(engine, batch_size=2).generate_until(
        requests(*((prompt, {"max_gen_toks": 8}) for prompt in prompts))
    )
    alone = [engine.generate([prompt], Sampling(8))[0] for prompt in prompts]
    assert free == [engine.tokenizer.decode(each.token_ids) for each in alone]
    stop = free[1][2:5]
    settings = {"until": [stop, ""], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}
    assert Harness(engine).generate_until(requests((prompts[1], settings))) == [free[1][: free[1].index(stop)]]
    ids = engine.tokenizer.encode(LONG, bos=True)[-(POSITIONS - 8) :]
    [cut] = Harness(engine).generate_until(requests((LONG, {"max_gen_toks": 8})))
    assert cut == Harness(engine).generate_until(requests((engine.tokenizer.decode([1, *ids]), {"max_gen_toks": 8})))[0]
    with pytest.raises(RequestError, match=r"answers of 256 tokens and the model has 24 positions"):
        Harness(engine).generate_until(requests(("a", {})))


def test_generation_settings_are_lm_evals() -> None:
    assert sampling_of({"until": "\n", "max_gen_toks": 5, "max_tokens": 9}) == Sampling(5, stop=("\n",))
    assert sampling_of({"do_sample": True, "top_p": 0.5}) == Sampling(256, temperature=1.0, top_p=0.5)
    assert sampling_of({"temperature": 0.3}) == Sampling(256, temperature=0.3)
    assert sampling_of({"temperature": 0.3, "do_sample": False, "num_beams": 1}) == Sampling(256)
    with pytest.raises(RequestError, match="ask for num_beams, which Ostro has not"):
        sampling_of({"num_beams": 4})


def test_a_conversation_is_asked_with_the_tokens_of_training() -> None:
    engine = engine_of(max_position_embeddings=96)
    words, template = engine.tokenizer, templates.mistral_v1
    harness = Harness(engine, template)
    turns = [{"role": "user", "content": "Which wind?"}]
    asked = harness.apply_chat_template(turns)
    assert asked == "<s>[INST] Which wind? [/INST]"
    talk = Chat([Message("user", "Which wind?"), Message("assistant", "Ostro it is")], "x")
    ids = templates.render(talk, template, words).ids.tolist()[:-1]
    before = templates.prompt_of(Chat(talk.messages[:1], "x"), template, words).ids
    [(value, _)] = harness.loglikelihood(requests((asked, "Ostro it is")))
    with torch.no_grad():
        logits = engine.model.logits(engine.model(torch.tensor(ids), spans_of([len(ids)]))).log_softmax(-1)
    meant = sum(float(logits[at - 1, ids[at]]) for at in range(len(before), len(ids)))
    assert value == pytest.approx(meant, abs=2e-4)
    begun = harness.apply_chat_template(
        [*turns, {"role": "assistant", "content": "Ostro"}], add_generation_prompt=False
    )
    [(rest, _)] = harness.loglikelihood(requests((begun, " it is")))
    first = len(before) + len(words.encode("Ostro"))
    assert rest == pytest.approx(sum(float(logits[at - 1, ids[at]]) for at in range(first, len(ids))), abs=2e-4)


def test_what_cannot_be_evaluated_is_said(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path)]) == main(["evaluate", "x", "y", "--tasks", "z"]) == 2
    assert "name data to score or --tasks" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"--tasks needs lm-eval \(.*\): pip install 'ostro\[eval\]'"):
        run(Harness(engine), ["hellaswag"])
    with pytest.raises(ConfigError, match="--batch-size -1 is too small"):
        Harness(engine, batch_size=-1)
