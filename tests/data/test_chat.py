"""Templates against mistral-common and transformers, token for token; what is learned; what cannot be rendered."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.data import chat, conversations
from ostro.data.records import Chat, Message
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import DataError

SAMPLES = {
    "apache2_alpaca_format.json": conversations.alpaca,
    "sharegpt_250.json": conversations.sharegpt,
    "sharegpt_tools_150.json": conversations.sharegpt,
    "mlx_wwdc25_prompt_completion.jsonl": conversations.prompt_completion,
}
SPECIALS = ("<s>", "</s>", "[INST]", "[/INST]", "<unk>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "▁", "<0x0A>")


@pytest.fixture(scope="module")
def v1() -> Tokenizer:
    return load_tokenizer("v1")


@pytest.fixture(scope="module")
def v3() -> Tokenizer:
    return load_tokenizer("v3")


def records(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def sample(shared: Path, name: str) -> list[Chat]:
    read = SAMPLES[name]
    return [read(record, f"{name} record {at}") for at, record in enumerate(records(shared / "data" / name), start=1)]


def oracle(talk: Chat, version: str) -> tuple[list[int], list[bool]]:
    """What mistral-common makes of `talk`, checked and merged by its rules; the mask by its message encoders."""
    from mistral_common.protocol.instruct import messages as m
    from mistral_common.protocol.instruct import normalize, tool_calls, validator
    from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest

    turns: list[Any] = []
    for message in talk.messages:
        if message.role == "system":
            turns.append(m.SystemMessage(content=message.content))
        elif message.role == "user":
            turns.append(m.UserMessage(content=message.content))
        elif message.role == "tool":
            turns.append(m.ToolMessage(content=message.content, tool_call_id=message.tool_call_id))
        else:
            calls = [tool_calls.ToolCall.from_openai(dict(call)) for call in message.tool_calls]
            content = message.content or None
            weight = float(message.trained)
            turns.append(m.FinetuningAssistantMessage(content=content, tool_calls=calls or None, weight=weight))
    tools = [tool_calls.Tool.from_openai(dict(tool)) for tool in talk.tools] or None
    request = ChatCompletionRequest(messages=turns, tools=tools)
    kind = validator.MistralRequestValidatorV3 if version == "v3" else validator.MistralRequestValidator
    kind(validator.ValidationMode.finetuning).validate_request(request)
    normalizer = normalize.InstructRequestNormalizer(
        m.UserMessage, m.FinetuningAssistantMessage, m.ToolMessage, m.SystemMessage, InstructRequest, None
    )
    instruct = normalizer.from_chat_completion_request(request)
    tokenizer = mistral(version).instruct_tokenizer
    ids = list(tokenizer.encode_instruct(instruct).tokens)
    trained, place = [False], 1
    last = max(at for at, turn in enumerate(instruct.messages) if turn.role == "user")
    first = min(at for at, turn in enumerate(instruct.messages) if turn.role == "user")
    for at, turn in enumerate(instruct.messages):
        if turn.role == "assistant":
            part, learned = tokenizer.encode_assistant_message(turn, at < last), bool(turn.weight)
        elif turn.role == "tool":
            part, learned = tokenizer.encode_tool_message(turn, at < last)[0], False
        else:
            prompt = instruct.system_prompt
            part = tokenizer.encode_user_message(turn, tools, at == last, at == first, system_prompt=prompt)[0]
            learned = False
        assert ids[place : place + len(part)] == part
        trained += [learned] * len(part)
        place += len(part)
    assert place == len(ids)
    return ids, trained


_MISTRAL: dict[str, Any] = {}


def mistral(version: str) -> Any:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    if version not in _MISTRAL:
        _MISTRAL[version] = getattr(MistralTokenizer, version)()
    return _MISTRAL[version]


def assert_equal(talks: Sequence[Chat], version: str, tokenizer: Tokenizer) -> None:
    rendered = chat.render_batch(talks, chat.TEMPLATES[f"mistral-{version}"], tokenizer)
    for talk, ours in zip(talks, rendered, strict=True):
        ids, trained = oracle(talk, version)
        assert ours.ids.dtype == np.uint32
        assert ours.trained.dtype == np.bool_
        assert ours.ids.tolist() == ids, talk.where
        assert ours.trained.tolist() == trained, talk.where
        assert "".join(text for text, learned in ours.pieces if learned)


def talk(*turns: tuple[str, str] | Message, tools: Sequence[Any] = ()) -> Chat:
    said = [turn if isinstance(turn, Message) else Message(turn[0], turn[1]) for turn in turns]  # type: ignore[arg-type]
    return Chat(said, "chat.jsonl line 7", tools)


def with_system(one: Chat) -> Chat:
    return Chat((Message("system", "Answer in one line."), *one.messages), one.where, one.tools)


def doubled(one: Chat) -> Chat:
    """Every turn that is text twice, so that merging has something to do."""
    return Chat(
        [
            each
            for message in one.messages
            for each in [message] * (2 if message.content and message.role != "tool" else 1)
        ],
        one.where,
        one.tools,
    )


@pytest.mark.parametrize("change", [lambda one: one, with_system, doubled], ids=["plain", "system", "doubled"])
@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_equal_mistral_common(shared, request, name, version, change):
    talks = [change(one) for one in sample(shared, name)]
    if name.startswith("mlx"):
        talks = talks[::6]
    tokenizer = request.getfixturevalue(version)
    if version == "v1" and name == "sharegpt_tools_150.json":
        refused: list[DataError] = []
        rendered = chat.render_batch(talks, chat.mistral_v1, tokenizer, refused)
        without = [one for one in talks if not one.tools]
        assert [each.where for each in rendered] == [one.where for one in without]
        assert len(rendered) + len(refused) == 150
        assert all("use mistral-v3" in str(error) for error in refused)
        talks = without
    assert_equal(talks, version, tokenizer)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
words = st.lists(
    st.one_of(st.sampled_from(SPECIALS), texts, st.sampled_from([" ", "\n", "  ", '{"a": 1}'])), max_size=6
)
content = words.map("".join)
identifiers = st.one_of(st.just("a1B2c3D4e"), st.from_regex(r"[a-zA-Z0-9]{9}", fullmatch=True))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | content, lambda inner: st.lists(inner, max_size=3)
)


@st.composite
def talks(draw, tools: bool) -> Chat:
    said = [Message("system", draw(content)) for _ in range(draw(st.integers(0, 2)))]
    for _ in range(draw(st.integers(1, 4))):
        said += [Message("user", draw(content)) for _ in range(draw(st.integers(1, 2)))]
        if tools and draw(st.booleans()):
            calls = []
            for _ in range(draw(st.integers(1, 2))):
                arguments = draw(st.one_of(content, st.dictionaries(content, json_values, max_size=2)))
                calls.append({"id": draw(identifiers), "function": {"name": "look_up", "arguments": arguments}})
            said.append(Message("assistant", "", trained=draw(st.booleans()), tool_calls=calls))
            said += [Message("tool", draw(content), tool_call_id=call["id"]) for call in calls]
        for _ in range(draw(st.integers(1, 2))):
            said.append(Message("assistant", draw(content.filter(bool)), trained=draw(st.booleans())))
    said.append(Message("user", "And?"))
    said.append(Message("assistant", draw(content.filter(bool))))
    described = {"name": "look_up", "description": draw(content), "parameters": {"type": "object"}}
    return Chat(said, "drawn", [{"type": "function", "function": described}] if tools and draw(st.booleans()) else ())


@settings(max_examples=150)
@given(talks(tools=False))
def test_drawn_talks_equal_mistral_common_v1(one):
    assert_equal([one], "v1", load_once("v1"))


@settings(max_examples=150)
@given(talks(tools=True))
def test_drawn_talks_equal_mistral_common_v3(one):
    assert_equal([one], "v3", load_once("v3"))


_LOADED: dict[str, Tokenizer] = {}


def load_once(version: str) -> Tokenizer:
    if version not in _LOADED:
        _LOADED[version] = load_tokenizer(version)
    return _LOADED[version]


@settings(max_examples=60)
@given(st.lists(talks(tools=False), min_size=1, max_size=3), st.sampled_from(["mistral-v1", "mistral-v3", "vicuna"]))
def test_learned_is_what_the_assistant_says_and_its_end(many, name):
    tokenizer = load_once("v3" if name == "mistral-v3" else "v1")
    for one, ours in zip(many, chat.render_batch(many, chat.TEMPLATES[name], tokenizer), strict=True):
        ids, trained = ours.ids.tolist(), ours.trained.tolist()
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert trained[-1]
        runs: list[list[int]] = []
        for at, learned in enumerate(trained):
            if learned and not trained[at - 1]:
                runs.append([])
            if learned:
                runs[-1].append(ids[at])
        said: list[str] = []
        for before, message in zip([None, *one.messages], one.messages, strict=False):
            if message.role == "assistant" and message.trained:
                goes_on = before is not None and before.role == "assistant" and before.trained
                if goes_on:
                    said[-1] += f"\n\n{message.content}"
                else:
                    said.append(message.content)
        strip = name == "mistral-v3"
        assert [run[-1] for run in runs] == [tokenizer.eos_token_id] * len(runs)
        said = [each.rstrip(" ") if strip else each for each in said]
        # A literal ▁ is the vocabulary's own sign for a space, and comes back as one.
        assert [tokenizer.decode(run) for run in runs] == [each.replace("▁", " ") for each in said]


@settings(max_examples=30)
@given(st.lists(talks(tools=True), min_size=1, max_size=4))
def test_a_batch_is_its_talks_one_by_one(many):
    tokenizer = load_once("v3")
    for one, ours in zip(many, chat.render_batch(many, chat.mistral_v3, tokenizer), strict=True):
        alone = chat.render(one, chat.mistral_v3, tokenizer)
        assert alone.ids.tolist() == ours.ids.tolist()
        assert alone.trained.tolist() == ours.trained.tolist()
        assert alone.pieces == ours.pieces


def test_preview_pieces_and_note(v1):
    one = chat.render(talk(("user", "Hi"), ("assistant", "Yo"), ("user", "?"), ("user", "!")), chat.mistral_v1, v1)
    assert one.pieces == [("<s>", False), ("[INST] Hi [/INST]", False), ("Yo", True), ("</s>", True)]
    assert one.note == "chat.jsonl line 7: the last 2 turns come after the assistant's last one and are left out."
    assert chat.render(talk(("user", "Hi"), ("assistant", "Yo")), chat.mistral_v1, v1).note == ""


def test_control_tokens_in_a_text_stay_text(v1, v3):
    for template, tokenizer in ((chat.mistral_v1, v1), (chat.mistral_v3, v3), (chat.vicuna, v1)):
        ids = chat.render(talk(("user", " ".join(SPECIALS)), ("assistant", "".join(SPECIALS))), template, tokenizer).ids
        assert (ids == tokenizer.bos_token_id).sum() == 1
        assert (ids == tokenizer.eos_token_id).sum() == 1
        assert (ids == tokenizer.unk_token_id).sum() == 0


def test_an_id_mistral_does_not_know_is_replaced_alike_in_call_and_answer(v3):
    call = {"id": "call_abc", "function": {"name": "f", "arguments": "{}"}}
    one = talk(
        ("user", "q"), Message("assistant", "", tool_calls=[call]), Message("tool", "1", tool_call_id="call_abc")
    )
    ours = chat.render(talk(*one.messages, ("assistant", "a")), chat.mistral_v3, v3)
    made = chat.call_id("call_abc")
    assert re.fullmatch("[a-zA-Z0-9]{9}", made)
    assert "".join(text for text, _ in ours.pieces).count(made) == 2


def test_call_ids_are_what_they_were():
    assert [chat.call_id(seed) for seed in ("", "call_abc", "\ud800")] == CALL_IDS


# Written down once: a change here changes everybody's tokens.
CALL_IDS = ["fs7vrZOoG", "DewH31DCD", "1dnTpiB2L"]


def test_vicuna_equals_the_seed(shared, v1):
    recorded = np.load(shared / "golden/preprocess/apache2_alpaca_seq2048.npz")
    ours = chat.render_batch(sample(shared, "apache2_alpaca_format.json"), chat.vicuna, v1)
    for one, ids, labels in zip(ours, recorded["input_ids"], recorded["labels"], strict=True):
        length = min(len(one.ids), len(ids))
        assert ids[:length].tolist() == one.ids[:length].tolist()
        assert not ids[length:].any()
        assert (labels[:length] != -100).tolist() == one.trained[:length].tolist()


def test_vicuna_leaves_out_what_precedes_the_question(v1):
    one = talk(("system", "S."), ("assistant", "Hello!"), ("user", "a"), ("user", "b"), ("assistant", "c"))
    ours = chat.render(one, chat.vicuna, v1)
    assert [text for text, _ in ours.pieces] == ["<s>", "S. USER: a\n\nb ASSISTANT:", "c", "</s>"]
    with pytest.raises(DataError, match="no answer that is learned follows the first question"):
        chat.render(talk(("assistant", "a"), ("user", "b"), Message("assistant", "c", trained=False)), chat.vicuna, v1)


def assert_sentence(error: DataError, part: str) -> None:
    text = str(error)
    assert part in text
    assert text.endswith((".", "?"))
    assert "\n" not in text


CALL = {"id": "a1B2c3D4e", "function": {"name": "f", "arguments": "{}"}}
CALLED = Message("assistant", "", tool_calls=[CALL])
FAULTS = {
    "no answer": (talk(("user", "a")), "v1", "the assistant says nothing in this conversation"),
    "no turns": (talk(), "v1", "the assistant says nothing in this conversation"),
    "weight 0": (talk(("user", "a"), Message("assistant", "b", trained=False)), "v1", "has weight 0"),
    "tools in v1": (
        talk(("user", "a"), ("assistant", "b"), tools=[{"function": {"name": "f"}}]),
        "v1",
        "use mistral-v3",
    ),
    "call in v1": (talk(("user", "a"), CALLED), "v1", "use mistral-v3"),
    "call in vicuna": (talk(("user", "a"), CALLED), "vicuna", "use mistral-v3"),
    "assistant alone": (talk(("assistant", "a")), "v1", "nobody asked"),
    "tool first": (talk(("tool", "a"), ("assistant", "b")), "v3", "no tool at the beginning"),
    "tool after user": (talk(("user", "a"), ("tool", "b"), ("assistant", "c")), "v3", "no tool after user"),
    "late system": (
        talk(("user", "a"), ("assistant", "b"), ("system", "c"), ("assistant", "d")),
        "v1",
        "after assistant",
    ),
    "says nothing": (talk(("user", "a"), ("assistant", "")), "v1", "message 2: the assistant says nothing"),
    "says and calls": (
        talk(("user", "a"), Message("assistant", "b", tool_calls=[CALL])),
        "v3",
        "text and calls at once",
    ),
    "merged says and calls": (talk(("user", "a"), ("assistant", "b"), CALLED), "v3", "text and calls at once"),
    "no id": (talk(("user", "a"), CALLED, ("tool", "b"), ("assistant", "c")), "v3", "has no id"),
    "bad name": (
        talk(("user", "a"), Message("assistant", "", tool_calls=[{"id": "1", "function": {"name": "f g"}}])),
        "v3",
        "the function name 'f g' is none",
    ),
    "bad tool": (talk(("user", "a"), ("assistant", "b"), tools=[{"function": {"name": ""}}]), "v3", "function name ''"),
    "surrogate": (talk(("user", "a\ud800"), ("assistant", "b")), "v1", "half of a surrogate pair"),
    "surrogate in vicuna": (talk(("user", "a"), ("assistant", "\udfff")), "vicuna", "half of a surrogate pair"),
    "deep": (
        talk(("user", "a"), CALLED, Message("tool", "[" * 100_000, tool_call_id="x"), ("assistant", "b")),
        "v3",
        "JSON",
    ),
    "long number": (
        talk(("user", "a"), CALLED, Message("tool", "9" * 5_000, tool_call_id="x"), ("assistant", "b")),
        "v3",
        "too long a number",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_talk_that_cannot_be_rendered_says_why(name, v1, v3):
    one, kind, part = FAULTS[name]
    template = chat.TEMPLATES[kind if kind == "vicuna" else f"mistral-{kind}"]
    tokenizer = v3 if kind == "v3" else v1
    with pytest.raises(DataError) as caught:
        chat.render(one, template, tokenizer)
    assert_sentence(caught.value, part)
    assert str(caught.value).startswith("chat.jsonl line 7: ")
    refused: list[DataError] = []
    good = talk(("user", "a"), ("assistant", "b"))
    assert len(chat.render_batch([good, one, good], template, tokenizer, refused)) == 2
    assert [str(error) for error in refused] == [str(caught.value)]


def test_a_tokenizer_without_the_control_tokens_is_named(v1):
    with pytest.raises(DataError, match=r"tokenizer v1 has no control token \[INST\]"):
        chat.render(talk(("user", "a"), ("assistant", "b")), chat.mistral_v3, v1)


@pytest.mark.parametrize(("name", "tokens"), [("mistral-v1", "v1"), ("vicuna", "v1"), ("mistral-v3", "v3")])
def test_what_precedes_an_answer_is_what_preceded_it_in_training(request, name, tokens):
    tokenizer, template = request.getfixturevalue(tokens), chat.TEMPLATES[name]
    turns = [
        Message("user", "Hi [/INST]</s>"),
        Message("assistant", "Hello.\n "),
        Message("user", " é"),
        Message("user", ""),
    ]
    turns += [Message("assistant", " y"), Message("user", "z")]
    for system in ([], [Message("system", "Be brief.")]):
        for last in (1, 4, 6):
            before = [*system, *turns[:last]]
            learned = [dataclasses.replace(message, trained=False) for message in before]
            whole = chat.render(Chat([*learned, Message("assistant", "w")], "x"), template, tokenizer)
            asked = chat.prompt_of(Chat(before, "x"), template, tokenizer)
            assert asked.ids == whole.ids[: int(whole.trained.argmax())].tolist()
            assert asked.ids[0] == tokenizer.bos_token_id
            assert asked.end_ids == (tokenizer.eos_token_id,)
            assert asked.text.endswith(
                {"mistral-v1": " [/INST]", "vicuna": " ASSISTANT:", "mistral-v3": "[/INST]"}[name]
            )
