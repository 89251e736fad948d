"""Records of JSON into conversations: what each kind reads, what each fault is told, and 2,000 damaged records."""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from ostro.data import chat
from ostro.data.conversations import CONVERSATIONS, alpaca, kind_of, messages, prompt_completion, sharegpt
from ostro.data.jinja import JinjaTemplate
from ostro.data.records import Message
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import DataError

WHERE = "chat.jsonl line 412"
SAMPLES = {
    "apache2_alpaca_format.json": "alpaca",
    "sharegpt_250.json": "sharegpt",
    "sharegpt_tools_150.json": "sharegpt",
    "mlx_wwdc25_prompt_completion.jsonl": "prompt_completion",
}


def records(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def call(name: str = "f", arguments: Any = "{}", identifier: Any = "a1B2c3D4e") -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if identifier is None else {"id": identifier, **made}


def openai(*turns: Any, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": turn[0], "content": turn[1]} if isinstance(turn, tuple) else turn for turn in turns],
        **more,
    }


def shared_turns(*turns: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": said_by, "value": value} for said_by, value in turns], **more}


def test_every_sample_is_found_and_read(shared):
    for name, kind in SAMPLES.items():
        for at, record in enumerate(records(shared / "data" / name), start=1):
            assert kind_of(record) == kind
            found = CONVERSATIONS[kind](record, f"{name} record {at}")
            assert found.where == f"{name} record {at}"
            assert any(message.role == "assistant" for message in found.messages)


def test_kind_of():
    assert kind_of(openai(("user", "a"))) == "messages"
    assert kind_of({"messages": 1, "prompt": "a", "completion": "b"}) == "messages"
    assert kind_of({"instruction": "a", "output": "b", "text": "c"}) == "alpaca"
    assert [kind_of(other) for other in ({"text": "a"}, {"prompt": "a"}, {}, [], None, "messages")] == [None] * 6
    assert list(CONVERSATIONS) == ["messages", "sharegpt", "prompt_completion", "alpaca"]


def test_alpaca_prompts():
    found = alpaca({"instruction": "Add {input}.", "input": "1 {output}", "output": "2", "system": "S"}, WHERE)
    assert found.messages == (
        Message("system", "S"),
        Message(
            "user",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nAdd {input}.\n\n### Input:\n"
            "1 {output}\n\n### Response:",
        ),
        Message("assistant", "2"),
    )
    for record in ({"instruction": "Go.", "output": "x"}, {"instruction": "Go.", "input": "", "output": "x"}):
        assert alpaca(record, WHERE).messages[0].content == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nGo.\n\n### Response:"
        )


def test_sharegpt_with_tools():
    tools = [{"name": "f", "description": "d", "parameters": {"type": "object"}}]
    record = shared_turns(
        ("human", "q"),
        ("function_call", '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": "{}"}]'),
        ("observation", '{"y": 2}'),
        ("observation", {"z": 3}),
        ("gpt", "a"),
        system="S",
        tools=json.dumps(tools),
    )
    found = sharegpt(record, WHERE)
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert found.tools == ({"type": "function", "function": tools[0]},)
    calls = found.messages[2].tool_calls
    assert [each["function"] for each in calls] == [
        {"name": "f", "arguments": {"x": 1}},
        {"name": "g", "arguments": "{}"},
    ]
    assert [message.tool_call_id for message in found.messages[3:5]] == [each["id"] for each in calls]
    assert found.messages[4].content == '{"z": 3}'
    assert sharegpt({**record, "tools": tools}, WHERE).tools == found.tools
    for none in ("", "[]", " ", [], None):
        assert sharegpt({**record, "tools": none}, WHERE).tools == ()


def test_made_ids_follow_from_the_record_alone():
    record = openai(
        ("user", "é"),
        {"role": "assistant", "content": None, "tool_calls": [call(identifier=None), call("g", identifier="null")]},
        {"role": "tool", "name": "g", "content": "1"},
        {"role": "tool", "content": "2"},
        ("assistant", "b"),
    )
    found = messages(record, WHERE)
    ids = [each["id"] for each in found.messages[1].tool_calls]
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert ids == [chat.call_id(f"{canonical}\n{at}") for at in range(2)]
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", each) for each in ids)
    # The answer that names g is g's, though it comes first.
    assert [message.tool_call_id for message in found.messages[2:4]] == ids[::-1]
    turned = dict(reversed(list(json.loads(json.dumps(record)).items())))
    assert messages(turned, "elsewhere.jsonl line 1").messages == found.messages
    assert messages({**record, "n": 1}, WHERE).messages != found.messages


def test_openai_messages():
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    record = openai(
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": "c", "weight": 0},
        ("user", "d"),
        {"role": "assistant", "tool_calls": [call(arguments={"x": "é"})], "weight": 1.0},
        {"role": "tool", "tool_call_id": "a1B2c3D4e", "content": None},
        {"role": "assistant", "content": "e", "weight": None, "refusal": None},
        tools=[tool],
    )
    found = messages(record, WHERE)
    assert [message.role for message in found.messages] == [
        "system", "user", "assistant", "user", "assistant", "tool", "assistant"
    ]  # fmt: skip
    assert found.messages[1] == Message("user", "a\n\nb", name="Ann")
    assert [message.trained for message in found.messages if message.role == "assistant"] == [False, True, True]
    assert found.messages[4].content == ""
    assert found.messages[4].tool_calls[0]["function"]["arguments"] == {"x": "é"}
    assert found.messages[5].content == ""
    assert found.tools == (tool,)


def test_prompt_and_completion():
    assert prompt_completion({"prompt": "a", "completion": "b"}, WHERE).messages == (
        Message("user", "a"),
        Message("assistant", "b"),
    )
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    said = [{"role": "assistant", "content": "d"}]
    for completion in (said, "d"):
        found = prompt_completion({"prompt": asked, "completion": completion}, WHERE)
        assert [(message.content, message.trained) for message in found.messages if message.role == "assistant"] == [
            ("b", False),
            ("d", True),
        ]


ASKED, CALLED = ("user", "a"), {"role": "assistant", "content": None, "tool_calls": [call()]}
ANSWERED = {"role": "tool", "tool_call_id": "a1B2c3D4e", "content": "1"}
DEEP = "[" * 100_000
FAULTS: list[tuple[str, Any, str]] = [
    ("alpaca", [], "a conversation is a JSON object, and this is a list"),
    ("alpaca", "x", "this is a string"),
    ("alpaca", None, "this is null"),
    ("alpaca", {}, 'the field "instruction" is missing, there is nothing'),
    ("alpaca", {"instructions": "a", "output": "b"}, "Did you mean 'instructions'?"),
    ("alpaca", {"instruction": "a"}, 'the field "output" is missing'),
    ("alpaca", {"instruction": 1, "output": "b"}, '"instruction" must be a text, and is a number'),
    ("alpaca", {"instruction": "a", "output": None}, '"output" must be a text, and is null'),
    ("alpaca", {"instruction": "a", "output": " \n"}, '"output" is blank'),
    ("alpaca", {"instruction": "", "output": "b"}, '"instruction" is blank'),
    ("alpaca", {"instruction": "a", "input": ["c"], "output": "b"}, '"input" must be a text, and is a list'),
    ("alpaca", {"instruction": "a", "output": "b", "system": True}, '"system" must be a text, and is true or false'),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c", "d"]]}, 'have no place for "history"'),
    ("alpaca", {"instruction": "a\ud800", "output": "b"}, "half of a surrogate pair"),
    ("sharegpt", {"conversation": []}, "Did you mean 'conversation'?"),
    ("sharegpt", {"conversations": []}, '"conversations" is empty'),
    ("sharegpt", {"conversations": {"from": "human"}}, '"conversations" must be a list of turns, and is an object'),
    ("sharegpt", {"conversations": ["a"]}, "turn 1 is a string"),
    ("sharegpt", {"conversations": [{"value": "a"}]}, 'turn 1 has no "from"'),
    ("sharegpt", {"conversations": [{"from": "human"}]}, 'turn 1 has no "value"'),
    ("sharegpt", shared_turns(("humans", "a")), "\"from\" is 'humans': use one of"),
    ("sharegpt", shared_turns(("gtp", "a")), "Did you mean 'gpt'?"),
    ("sharegpt", shared_turns((["gpt"], "a")), "\"from\" is ['gpt']"),
    ("sharegpt", shared_turns(("human", None)), "turn 1: what the user says must be a text, and is null"),
    ("sharegpt", shared_turns(("human", "a"), ("gpt", "")), "turn 2: the assistant says nothing"),
    ("sharegpt", shared_turns(("system", 1)), "turn 1: what is said must be a text"),
    ("sharegpt", shared_turns(("human", "a"), ("observation", "b")), "turn 2 is a tool's answer, and no call before"),
    ("sharegpt", shared_turns(("human", "a"), ("function_call", "f(x)")), "the function call is not JSON"),
    ("sharegpt", shared_turns(("human", "a"), ("function_call", DEEP)), "the function call is not JSON"),
    ("sharegpt", shared_turns(("human", "a"), ("function_call", "[]")), "the function call is an empty list"),
    ("sharegpt", shared_turns(("human", "a"), ("function_call", "3")), 'the function call 3 has no "name"'),
    (
        "sharegpt",
        shared_turns(("human", "a"), ("function_call", '{"name": 1}')),
        "the name of a called function must be",
    ),
    ("sharegpt", shared_turns(("human", "a"), ("function_call", '{"name": " "}')), "called function is blank"),
    (
        "sharegpt",
        shared_turns(("human", "a"), ("function_call", '{"name": "f", "arguments": [1]}')),
        "the arguments of f are a list",
    ),
    (
        "sharegpt",
        shared_turns(("human", "a"), ("function_call", '{"name": "f"}'), ("gpt", "b")),
        "turn 3 (assistant) comes before the answer to f",
    ),
    ("sharegpt", shared_turns(("human", "a"), ("gpt", "b"), tools="{"), '"tools" is not JSON'),
    ("sharegpt", shared_turns(("human", "a"), ("gpt", "b"), tools="{}"), '"tools" must be a list, and is an object'),
    ("sharegpt", shared_turns(("human", "a"), ("gpt", "b"), tools=["f"]), "tool 1 describes no function by name"),
    (
        "sharegpt",
        shared_turns(("human", "a"), ("gpt", "b"), tools=[{"name": ""}]),
        "tool 1 describes no function by name",
    ),
    (
        "sharegpt",
        shared_turns(("human", "a"), ("gpt", "b"), tools=[{"name": "f", "parameters": "x"}]),
        "the parameters of tool 1 (f) are a string",
    ),
    (
        "sharegpt",
        shared_turns(("human", "a"), ("gpt", "b"), tools=[{"name": "f", "description": 1}]),
        "the description of tool 1 (f) is no text",
    ),
    ("sharegpt", shared_turns(("human", "a"), ("gpt", "b"), tools=[{"name": "f\udc00"}]), "half of a surrogate pair"),
    ("messages", {"message": []}, "Did you mean 'message'?"),
    ("messages", {"messages": "a"}, '"messages" must be a list of turns, and is a string'),
    ("messages", {"messages": []}, '"messages" is empty'),
    ("messages", openai(None), "message 1 is null"),
    ("messages", openai({"from": "human", "value": "a"}), "looks like ShareGPT, so say --kind sharegpt"),
    ("messages", openai({"content": "a"}), 'message 1 has no "role": say who speaks'),
    ("messages", openai(("users", "a")), "Did you mean 'user'?"),
    ("messages", openai(("function", "a")), "\"role\" is 'function': use one of"),
    ("messages", openai(({}, "a")), '"role" is {}'),
    ("messages", openai({"role": "user"}), 'message 1 has no "content"'),
    ("messages", openai(("user", None)), "message 1: the user says nothing"),
    ("messages", openai(("user", 3)), '"content" must be a text, and is a number'),
    ("messages", openai(("user", [{"type": "image_url"}])), "a part of \"content\" is 'image_url': Mixtral reads only"),
    ("messages", openai(("user", ["a"])), 'a part of "content" is a string'),
    ("messages", openai(("user", [{"type": "text"}])), 'the "text" of a part must be a text, and is null'),
    ("messages", openai(ASKED, {"role": "assistant", "content": "b", "weight": 0.5}), '"weight" is 0.5'),
    ("messages", openai(ASKED, {"role": "assistant", "content": "b", "weight": "1"}), "\"weight\" is '1'"),
    ("messages", openai(ASKED, {"role": "assistant", "function_call": {"name": "f"}}), 'the old field "function_call"'),
    ("messages", openai({"role": "user", "content": "a", "tool_calls": [call()]}), "only the assistant calls tools"),
    ("messages", openai(ASKED, {"role": "assistant", "tool_calls": call()}), '"tool_calls" must be a list'),
    ("messages", openai(ASKED, {"role": "assistant", "tool_calls": ["f"]}), "the call 'f' is not one"),
    ("messages", openai(ASKED, {"role": "assistant", "tool_calls": [{"name": "f"}]}), "is not one: write"),
    (
        "messages",
        openai(ASKED, {"role": "assistant", "tool_calls": [{**call(), "type": "code"}]}),
        "a call of type 'code'",
    ),
    ("messages", openai(ASKED, {"role": "assistant", "tool_calls": [call(identifier=7)]}), '"id" must be a text'),
    ("messages", openai(ASKED, {"role": "assistant", "tool_calls": [call(arguments="{x")]}), "string of f is not JSON"),
    ("messages", openai(ASKED, {"role": "assistant", "tool_calls": [call(arguments=2)]}), "of f are a number"),
    ("messages", openai(ASKED, {"role": "assistant", "tool_calls": [call(), call()]}), "two calls with the id"),
    ("messages", openai(ASKED, ANSWERED), "message 2 is a tool's answer, and no call before it waits"),
    (
        "messages",
        openai(ASKED, CALLED, ANSWERED, ANSWERED),
        "message 4 is a tool's answer, and no call before it waits",
    ),
    ("messages", openai(ASKED, CALLED, {**ANSWERED, "tool_call_id": "x"}), "answers the call 'x', and waiting is"),
    ("messages", openai(ASKED, CALLED, ("user", "b")), "message 3 (user) comes before the answer to f"),
    ("messages", openai(("user", "a\udc00")), "half of a surrogate pair"),
    ("prompt_completion", {"prompt": "a"}, 'the field "completion" is missing'),
    ("prompt_completion", {"prompt": "", "completion": "b"}, '"prompt" is blank'),
    ("prompt_completion", {"prompt": "a", "completion": 1}, '"completion" must be a text, and is a number'),
    ("prompt_completion", {"prompt": [], "completion": "b"}, '"prompt" is empty'),
    ("prompt_completion", {"prompt": [{"role": "user"}], "completion": "b"}, '"prompt": message 1 has no "content"'),
    (
        "prompt_completion",
        {"prompt": "a", "completion": [{"role": "user", "content": "b"}]},
        '"completion" begins with a message of the user',
    ),
]


@pytest.mark.parametrize(
    ("kind", "record", "part"), FAULTS, ids=[f"{kind}-{at}" for at, (kind, _, _) in enumerate(FAULTS)]
)
def test_a_fault_is_told_in_one_sentence(kind, record, part):
    with pytest.raises(DataError) as caught:
        CONVERSATIONS[kind](record, WHERE)
    assert_sentence(caught.value)
    assert part in str(caught.value)


def assert_sentence(error: DataError) -> None:
    text = str(error)
    assert text.startswith(WHERE)
    assert text.endswith((".", "?"))
    assert "\n" not in text
    assert text.isprintable()
    assert len(text) < 400


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inside for place in places(each, (*path, key)))]


OTHERS = (
    None,
    True,
    0,
    -1.5,
    float("nan"),
    10**400,
    "",
    " ",
    "\0",
    "\ud83d",
    "\ufdd0",
    "</s>[INST]",
    [],
    {},
    [[]],
    "[" * 5000,
)


def damaged(record: Any, draw: random.Random) -> Any:
    """A record with one thing wrong: gone, doubled, retyped, renamed, cut, wrapped, moved."""
    record = copy.deepcopy(record)
    path = draw.choice(places(record)[1:] or [()])
    if not path:
        return draw.choice(OTHERS)
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], parent[path[-1]]
    what = draw.randrange(9)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, list):
        parent.insert(draw.randrange(len(parent) + 1), copy.deepcopy(value))
    elif what == 2 and isinstance(parent, list):
        draw.shuffle(parent)
    elif what == 3 and isinstance(parent, dict):
        parent[draw.choice(["from", "value", "role", "content", "tool_calls", "tools", "weight", "name", "x"])] = (
            parent.pop(key)
        )
    elif what == 4 and isinstance(value, str):
        parent[key] = value[: draw.randrange(len(value) + 1)]
    elif what == 5 and isinstance(value, str):
        parent[key] = value[:3] + draw.choice([each for each in OTHERS if isinstance(each, str)]) + value[3:]
    elif what == 6:
        parent[key] = draw.choice([[value], {"content": value}, json.dumps(value), [value, value]])
    elif what == 7:
        other = record
        for each in draw.choice(places(record)):
            other = other[each]
        parent[key] = copy.deepcopy(other)
    else:
        parent[key] = draw.choice(OTHERS)
    return record


SEEDS = [
    openai(ASKED, CALLED, ANSWERED, {"role": "assistant", "content": [{"type": "text", "text": "b"}], "weight": 1}),
    openai(("system", "s"), ASKED, ("assistant", "b"), tools=[{"type": "function", "function": {"name": "f"}}]),
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_two_thousand_damaged_records_are_refused_or_read(shared):
    draw = random.Random(4)
    good = [record for name in SAMPLES for record in records(shared / "data" / name)[:40]] + SEEDS * 15
    v1, v3 = load_tokenizer("v1"), load_tokenizer("v3")
    ways = [(chat.mistral_v1, v1), (chat.mistral_v3, v3), (chat.vicuna, v1), (JinjaTemplate(CHATML), v1)]
    read, errors = [], 0
    for _ in range(2_000):
        original = draw.choice(good)
        record = original
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            record = damaged(record, draw)
        kind = kind_of(record) or kind_of(original)
        assert kind is not None
        try:
            read.append(CONVERSATIONS[kind](record, WHERE))
        except DataError as error:
            assert_sentence(error)
            errors += 1
    assert errors > 600
    assert len(read) > 400
    for template, tokenizer in ways:
        refused: list[DataError] = []
        rendered = chat.render_batch(read, template, tokenizer, refused)
        assert len(rendered) + len(refused) == len(read)
        assert len(rendered) > 100
        for error in refused:
            assert_sentence(error)
        for one in rendered:
            assert one.ids.shape == one.trained.shape
            assert one.trained.any()
