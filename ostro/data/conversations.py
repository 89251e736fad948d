"""Records of JSON into conversations: Alpaca, ShareGPT, OpenAI's messages, prompt and completion.

A call without an id gets one that depends on the record alone: 9 characters of [a-zA-Z0-9], as Mistral wants them,
from the hash of the record's content and of the call's number in it (`_Ids`), so that preparing twice, elsewhere
or in another order gives the same tokens. An answer without an id belongs to the first call of the turn before
it that has none yet, one of the same name first.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ostro.data.chat import call_id
from ostro.data.records import Chat, Message, Role
from ostro.errors import DataError, nearest

# The two prompts of Stanford Alpaca (its train.py), with an input and without; the whole is the user's turn.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_SHAREGPT: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_OPENAI: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def alpaca(record: Any, where: str) -> Chat:
    """Return an Alpaca record (`instruction`, `output`, perhaps `input` and `system`) as question and answer.

    Raises DataError, which begins with `where`, for fields that are missing, blank or no text.
    """
    given = _object(record, where)
    instruction = _filled(_required(given, "instruction", where), where, '"instruction"')
    output = _filled(_required(given, "output", where), where, '"output"')
    context = _optional(given, "input", where)
    if given.get("history"):
        raise DataError(f'{where}: Alpaca\'s prompts have no place for "history": write such records as messages.')
    parts = [_WITH_INPUT if context else _WITHOUT_INPUT, f"### Instruction:\n{instruction}"]
    parts += [f"### Input:\n{context}"] if context else []
    question = "\n\n".join([*parts, "### Response:"])
    return Chat((*_system(given, where), Message("user", question), Message("assistant", output)), where)


def sharegpt(record: Any, where: str) -> Chat:
    """Return a ShareGPT record (`conversations` of `from` and `value`, perhaps `system` and `tools`).

    `function_call` holds {"name", "arguments"} or a list of such, as JSON; `observation` answers it. Raises
    DataError, which begins with `where`, for whatever is not so.
    """
    given = _object(record, where)
    turns = _turns(_required(given, "conversations", where), where, "conversations")
    ids = _Ids(given, where)
    found = [_sharegpt_turn(turn, f"{where}: turn {at}", ids) for at, turn in enumerate(turns, start=1)]
    said = (*_system(given, where), *_linked(found, where, "turn"))
    return Chat(said, where, _tools(given.get("tools"), where))


def messages(record: Any, where: str) -> Chat:
    """Return OpenAI's `messages` (with `tools`, `tool_calls` and an assistant's `weight` 0 or 1) as a conversation.

    Content may be a list of text parts, joined by blank lines as mistral-common joins them, or null beside calls.
    Raises DataError, which begins with `where`, for whatever is not so.
    """
    given = _object(record, where)
    turns = _turns(_required(given, "messages", where), where, "messages")
    found = _openai_turns(turns, where, _Ids(given, where))
    return Chat(_linked(found, where, "message"), where, _tools(given.get("tools"), where))


def prompt_completion(record: Any, where: str) -> Chat:
    """Return `prompt` and `completion`, each a text or a list of messages; only the completion is learned.

    Raises DataError, which begins with `where`, for whatever is not so.
    """
    given = _object(record, where)
    prompt, completion = _required(given, "prompt", where), _required(given, "completion", where)
    ids = _Ids(given, where)
    if isinstance(prompt, list):
        asked = _openai_turns(_turns(prompt, where, "prompt"), f'{where}: "prompt"', ids)
        asked = [dataclasses.replace(message, trained=False) for message in asked]
    else:
        asked = [*_system(given, where), Message("user", _filled(prompt, where, '"prompt"'))]
    if isinstance(completion, list):
        said = _openai_turns(_turns(completion, where, "completion"), f'{where}: "completion"', ids)
        if said[0].role != "assistant":
            raise DataError(
                f'{where}: "completion" begins with a message of the {said[0].role}, and what is learned is the '
                "assistant's: move what comes before it into the prompt."
            )
    else:
        said = [Message("assistant", _filled(completion, where, '"completion"'))]
    return Chat(_linked([*asked, *said], where, "message"), where, _tools(given.get("tools"), where))


# A kind of conversation is a function, and a line here.
CONVERSATIONS: dict[str, Callable[[Any, str], Chat]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "prompt_completion": prompt_completion,
    "alpaca": alpaca,
}
# What tells the kinds apart: all of the fields must be there; the first that fits is it.
_MARKS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}


def kind_of(record: Any) -> str | None:
    """Return the key of CONVERSATIONS whose fields `record` has, None where it has none of them."""
    if not isinstance(record, Mapping):
        return None
    return next((kind for kind, marks in _MARKS.items() if all(mark in record for mark in marks)), None)


class _Ids:
    """Makes the ids of a record's calls: the n-th call's from the record as canonical JSON, a newline and n."""

    def __init__(self, record: Mapping[str, Any], where: str) -> None:
        self._record, self._where = record, where
        self._content: str | None = None
        self._number = 0

    def next(self, given: str | None = None) -> str:
        """Return the next call's id: `given`, where the record has one."""
        self._number += 1
        if given is not None:
            return given
        if self._content is None:  # keys sorted, no blanks: how the file is laid out does not matter
            self._content = _dumped(self._record, self._where, sort_keys=True, separators=(",", ":"))
        return call_id(f"{self._content}\n{self._number - 1}")


def _sharegpt_turn(turn: Any, where: str, ids: _Ids) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f'{where} is {_kind(turn)}: write it as {{"from": "human", "value": "..."}}.')
    said_by = _either(turn, "from", "role", where)
    value = _either(turn, "value", "content", where)
    if not isinstance(said_by, str) or said_by not in _SHAREGPT:
        raise _unknown_role(said_by, "from", _SHAREGPT, where)
    role = _SHAREGPT[said_by]
    if said_by == "function_call":
        return Message(role, "", tool_calls=_sharegpt_calls(value, where, ids))
    if role == "tool":
        return Message(role, value if isinstance(value, str) else _dumped(value, where, ensure_ascii=False))
    return Message(role, _string(value, where, "what is said") if role == "system" else _said(value, where, role))


def _sharegpt_calls(value: Any, where: str, ids: _Ids) -> tuple[Mapping[str, Any], ...]:
    advice = 'write {"name": "...", "arguments": {...}} or a list of such'
    if isinstance(value, str):
        value = _parsed(value, where, "the function call", advice)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise DataError(f"{where}: the function call is an empty list: {advice}, or leave the turn out.")
    for call in calls:
        if not isinstance(call, Mapping) or "name" not in call:
            raise DataError(f'{where}: the function call {_shown(call)} has no "name": {advice}.')
    return tuple(_call(call, None, where, ids) for call in calls)


def _openai_turns(turns: Sequence[Any], where: str, ids: _Ids) -> list[Message]:
    return [_openai_turn(turn, f"{where}: message {at}", ids) for at, turn in enumerate(turns, start=1)]


def _openai_turn(turn: Any, where: str, ids: _Ids) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f'{where} is {_kind(turn)}: write it as {{"role": "user", "content": "..."}}.')
    if "role" not in turn:
        hint = "it looks like ShareGPT, so say --kind sharegpt" if "from" in turn else "say who speaks"
        raise DataError(f'{where} has no "role": {hint}.')
    if not isinstance(turn["role"], str) or turn["role"] not in _OPENAI:
        raise _unknown_role(turn["role"], "role", _OPENAI, where)
    role = _OPENAI[turn["role"]]
    if turn.get("function_call"):
        raise DataError(f'{where} has the old field "function_call": write it as a list "tool_calls".')
    calls = _openai_calls(turn.get("tool_calls"), role, where, ids)
    if "content" not in turn and not calls:
        raise DataError(f'{where} has no "content": add it, or leave the message out.')
    content = _content(turn.get("content"), where)
    if role in ("user", "assistant") and not calls:
        _said(content, where, role)
    trained = _weight(turn.get("weight"), where) if role == "assistant" else True
    return Message(
        role,
        content,
        trained=trained,
        tool_calls=calls,
        tool_call_id=_identifier(turn.get("tool_call_id"), where, "tool_call_id") if role == "tool" else None,
        name=_identifier(turn.get("name"), where, "name"),
    )


def _openai_calls(value: Any, role: Role, where: str, ids: _Ids) -> tuple[Mapping[str, Any], ...]:
    if value is None or value == []:
        return ()
    if role != "assistant":
        raise DataError(f'{where}: only the assistant calls tools, and this is the {role}: move "tool_calls" there.')
    if not isinstance(value, list):
        raise DataError(f'{where}: "tool_calls" must be a list, and is {_kind(value)}: put it in brackets.')
    calls = []
    for call in value:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise DataError(
                f"{where}: the call {_shown(call)} is not one: write "
                '{"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}.'
            )
        if call.get("type") not in (None, "function"):
            raise DataError(f'{where}: a call of type {_shown(call["type"])}: only "function" is known, so use it.')
        identifier = _identifier(call.get("id"), where, "id")
        calls.append(_call(function, None if identifier == "null" else identifier, where, ids))
    return tuple(calls)


def _call(function: Mapping[str, Any], identifier: str | None, where: str, ids: _Ids) -> Mapping[str, Any]:
    """Return OpenAI's form of one call; its arguments stay as they were written, proven to be JSON."""
    name = _filled(function.get("name"), where, "the name of a called function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        _string(arguments, where, f"the arguments of {name}")
        if arguments.strip():
            _parsed(arguments, where, f"the arguments string of {name}", "write a JSON object, or mend it")
    elif arguments is None:
        arguments = {}
    elif isinstance(arguments, Mapping):
        _dumped(arguments, where, ensure_ascii=False)
    else:
        raise DataError(
            f"{where}: the arguments of {name} are {_kind(arguments)}: write a JSON object, or one as a string."
        )
    return {"id": ids.next(identifier), "type": "function", "function": {"name": name, "arguments": arguments}}


def _linked(found: Sequence[Message], where: str, word: str) -> tuple[Message, ...]:
    """Return `found` with each answer tied to its call; `word` is what one is called in the file."""
    linked: list[Message] = []
    waiting: dict[str, str] = {}  # the calls of the last turn that nobody answered yet: id -> name
    for at, message in enumerate(found, start=1):
        here = f"{where}: {word} {at}"
        if message.role == "tool":
            answered = _answered(message, waiting, here)
            del waiting[answered]
            linked.append(dataclasses.replace(message, tool_call_id=answered))
            continue
        if waiting:
            raise DataError(
                f"{here} ({message.role}) comes before the answer to {' and '.join(waiting.values())}: every call is "
                "answered first, so add the answer, or take the call out."
            )
        for call in message.tool_calls:
            if call["id"] in waiting:
                raise DataError(f"{here} has two calls with the id {_shown(call['id'])}: give each its own.")
            waiting[call["id"]] = call["function"]["name"]
        linked.append(message)
    return tuple(linked)


def _answered(message: Message, waiting: Mapping[str, str], where: str) -> str:
    """Return the id of the call that a tool's `message` answers."""
    if not waiting:
        raise DataError(
            f"{where} is a tool's answer, and no call before it waits for one: roles must go assistant (with a "
            "call), tool, assistant; add the call, or take the answer out."
        )
    if message.tool_call_id is None:
        named = (identifier for identifier, name in waiting.items() if name == message.name)
        return next(named, next(iter(waiting)))
    if message.tool_call_id not in waiting:
        raise DataError(
            f"{where} answers the call {_shown(message.tool_call_id)}, and waiting is "
            f"{' and '.join(map(_shown, waiting))}: give it that id, or leave the id out."
        )
    return message.tool_call_id


def _tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Return OpenAI's function descriptions from a list or its JSON; bare functions, as ShareGPT has them, too."""
    advice = 'write a list of {"type": "function", "function": {"name": "...", "parameters": {...}}}'
    if isinstance(value, str):
        value = _parsed(_string(value, where, '"tools"'), where, '"tools"', advice) if value.strip() else None
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        raise DataError(f'{where}: "tools" must be a list, and is {_kind(value)}: {advice}.')
    _dumped(value, where, ensure_ascii=False)
    tools = []
    for at, tool in enumerate(value, start=1):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{where}: tool {at} describes no function by name: {advice}.")
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise DataError(
                f"{where}: the parameters of tool {at} ({function['name']}) are {_kind(function['parameters'])}: "
                "write them as a JSON schema, an object."
            )
        if not isinstance(function.get("description") or "", str):
            raise DataError(f"{where}: the description of tool {at} ({function['name']}) is no text: write a string.")
        tools.append({"type": "function", "function": dict(function)})
    return tuple(tools)


def _system(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    system = _optional(record, "system", where)
    return (Message("system", system),) if system else ()


def _weight(value: Any, where: str) -> bool:
    if value is None:
        return True
    if value not in (0, 1):
        raise DataError(f'{where}: "weight" is {_shown(value)}: it is 1 (learn this turn) or 0 (do not).')
    return value == 1


def _content(value: Any, where: str) -> str:
    if not isinstance(value, list):
        return "" if value is None else _string(value, where, '"content"')
    texts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            what = _shown(part.get("type")) if isinstance(part, Mapping) else _kind(part)
            raise DataError(
                f'{where}: a part of "content" is {what}: Mixtral reads only text, {{"type": "text", "text": "..."}}.'
            )
        texts.append(_string(part.get("text"), where, 'the "text" of a part'))
    return "\n\n".join(filter(None, texts))


def _said(value: Any, where: str, role: Role) -> str:
    text = _string(value, where, f"what the {role} says")
    if not text.strip():
        raise DataError(f"{where}: the {role} says nothing: write what is said, or leave the record out.")
    return text


def _turns(value: Any, where: str, field: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise DataError(f'{where}: "{field}" must be a list of turns, and is {_kind(value)}: put it in brackets.')
    if not value:
        raise DataError(f'{where}: "{field}" is empty: give it a question and an answer, or leave the record out.')
    return value


def _object(record: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: a conversation is a JSON object, and this is {_kind(record)}: put it in braces.")
    return record


def _required(record: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in record:
        guess = nearest(field, map(str, record))
        raise DataError(f'{where}: the field "{field}" is missing, there is {_fields(record)}: add it.{guess}')
    return record[field]


def _optional(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    return "" if value is None else _string(value, where, f'"{field}"')


def _either(turn: Mapping[str, Any], field: str, other: str, where: str) -> Any:
    if field not in turn and other not in turn:
        raise DataError(f'{where} has no "{field}", there is {_fields(turn)}: add it.')
    return turn[field] if field in turn else turn[other]


def _unknown_role(found: Any, field: str, known: Mapping[str, Role], where: str) -> DataError:
    guess = nearest(found, known) if isinstance(found, str) else ""
    return DataError(f'{where}: "{field}" is {_shown(found)}: use one of {", ".join(known)}.{guess}')


def _identifier(value: Any, where: str, field: str) -> str | None:
    return None if value is None or value == "" else _string(value, where, f'"{field}"')


def _filled(value: Any, where: str, what: str) -> str:
    text = _string(value, where, what)
    if not text.strip():
        raise DataError(f"{where}: {what} is blank: fill it in, or leave the record out.")
    return text


def _string(value: Any, where: str, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be a text, and is {_kind(value)}: write it as a string.")
    if not value.isascii():
        _encodable(value, where, what)
    return value


def _encodable(text: str, where: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {what} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character: remove it "
            "or write the whole pair."
        ) from None


def _parsed(text: str, where: str, what: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep, or a number too long"
        raise DataError(f"{where}: {what} is not JSON ({reason}; it begins {_shown(text)}): {advice}.") from None


def _dumped(value: Any, where: str, **how: Any) -> str:
    try:
        text = json.dumps(value, **how)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{where}: what is called or described there is not JSON: write plain JSON values.") from None
    _encodable(text, where, "what is called or described there")
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _fields(record: Mapping[str, Any]) -> str:
    more = f" and {len(record) - 6} more" if len(record) > 6 else ""
    return ", ".join(map(_shown, itertools.islice(record, 6))) + more or "nothing"


def _shown(value: Any) -> str:
    """Return `value` as an error shows it: on one line, short, whatever it holds."""
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."
