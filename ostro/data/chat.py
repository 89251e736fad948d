"""Conversations to token ids, and which of them are learned: what the assistant says, its end of sequence included.

A template is a function from a conversation to pieces. Control tokens are pieces of their own and enter by id;
everything else is text and stays text: a user who writes "</s>" or "[INST]" has written characters. BOS stands
once, at the front.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ostro.data.jinja import JinjaTemplate
from ostro.data.pieces import (
    Controls,
    Piece,
    Rendered,
    Template,
    assembled,
    check,
    control_piece,
    controls_of,
    json_or_text,
)
from ostro.data.records import Chat, Message
from ostro.errors import DataError, nearest

if TYPE_CHECKING:
    from ostro.data.tokenizer import Tokenizer

_LETTERS = string.ascii_letters + string.digits
_CALL_ID = re.compile("[a-zA-Z0-9]{9}")
_FUNCTION_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
_MIXTRAL_8X7B = "b4398a362e065f3d4c0998055d7fcb173e1c86dc0cc9b25aeac87b4206064088"  # its vocabulary's Tokenizer.sha256
# Vicuna v1.1, as FastChat and the seed have it.
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def render(chat: Chat, template: Template, tokenizer: Tokenizer) -> Rendered:
    """Return one conversation as tokens; raises DataError where the template cannot express it."""
    return render_batch([chat], template, tokenizer)[0]


def render_batch(
    chats: Iterable[Chat], template: Template, tokenizer: Tokenizer, refused: list[DataError] | None = None
) -> list[Rendered]:
    """Return many conversations as tokens; all their texts are encoded in one call, each distinct one once.

    What cannot be rendered raises a DataError that begins with the conversation's `where`; with a list `refused`
    it is added there and left out here.
    """
    controls = controls_of(tokenizer)
    planned: list[tuple[Chat, str, list[Piece]]] = []
    for chat in chats:
        try:
            cut, note = _learnable(chat)
            pieces = template(cut, controls)
            check(pieces, chat, controls)
        except DataError as error:
            if refused is None:
                raise
            refused.append(error)
        else:
            planned.append((chat, note, pieces))
    return assembled(planned, controls, tokenizer) if planned else []


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What stands before an answer: its text, its token ids, and the ids of the tokens that end the answer."""

    text: str
    ids: list[int]
    end_ids: tuple[int, ...]


def prompt_of(chat: Chat, template: Template, tokenizer: Tokenizer) -> Prompt:
    """Return what training puts before the assistant's next answer, token for token, whatever it says there.

    Raises DataError where the template cannot express the conversation.
    """
    # The same path as in training: an answer is put there, and what is learned of it is cut off again.
    asked = [dataclasses.replace(message, trained=False) for message in chat.messages]
    probed = dataclasses.replace(chat, messages=[*asked, Message("assistant", "x")])
    controls = controls_of(tokenizer)
    pieces = template(probed, controls)
    check(pieces, probed, controls)
    first = next((at for at, piece in enumerate(pieces) if piece.trained), None)
    if not first:
        raise DataError(f"{chat.where}: the chat template puts nothing before an answer: use another template.")
    [before] = assembled([(probed, "", pieces[:first])], controls, tokenizer)
    ends = (controls.ids[piece.text] for piece in pieces[first:] if piece.trained and piece.control)
    return Prompt("".join(piece.text for piece in pieces[:first]), before.ids.tolist(), tuple(ends))


def mistral_v1(chat: Chat, controls: Controls) -> list[Piece]:
    """Return the pieces of Mixtral-8x7B-Instruct's template; raises DataError for tools, which it has not.

    `<s>[INST] question [/INST]answer</s>`, a system prompt before the first question with a blank line between;
    each turn is encoded by itself (mistral-common, InstructTokenizerV1).
    """
    if chat.tools or any(message.tool_calls or message.role == "tool" for message in chat.messages):
        raise DataError(
            f"{chat.where}: this conversation has tools, and mistral-v1 (Mixtral-8x7B-Instruct) knows none: use "
            "mistral-v3, or leave it out."
        )
    system, turns = _mistral_turns(chat)
    pieces = [control_piece(controls.bos)]
    for message in turns:
        if message.role == "user":
            pieces.append(Piece(f"[INST] {_joined(system, message.content)} [/INST]"))
            system = ""
        else:
            pieces.append(Piece(message.content, message.trained))
            pieces.append(control_piece(controls.eos, message.trained))
    return pieces


def mistral_v3(chat: Chat, controls: Controls) -> list[Piece]:
    """Return the pieces of Mixtral-8x22B-Instruct's template, tools included; raises DataError for what it cannot say.

    Tools and system prompt stand at the last question. A call's id that is not 9 letters and digits is replaced by
    `call_id` of itself, and so is the answer's (mistral-common, InstructTokenizerV3).
    """
    system, turns = _mistral_turns(chat)
    last = next((at for at in range(len(turns) - 1, -1, -1) if turns[at].role == "user"), -1)
    pieces = [control_piece(controls.bos)]
    for at, message in enumerate(turns):
        if message.role == "user":
            if at == last and chat.tools:
                tools = _json([_tool(tool, chat.where) for tool in chat.tools], chat.where)
                pieces += _between("[AVAILABLE_TOOLS]", tools, "[/AVAILABLE_TOOLS]")
            content = _joined(system, message.content) if at == last else message.content
            pieces += _between("[INST]", content, "[/INST]")
        elif message.role == "tool":
            identifier = _mistral_id(message.tool_call_id, chat.where)
            answer = {"content": json_or_text(message.content, chat.where), "call_id": identifier}
            pieces += _between("[TOOL_RESULTS]", _json(answer, chat.where), "[/TOOL_RESULTS]")
        else:
            pieces += _assistant_v3(message, chat.where, controls)
    return pieces


def vicuna(chat: Chat, controls: Controls) -> list[Piece]:
    """Return the pieces of vicuna v1.1, the seed's template: `system USER: q ASSISTANT: a</s>USER: ...`.

    The conversation's own system prompt takes the place of vicuna's; what precedes the first question is left out, as
    the seed does. Raises DataError for tools.
    """
    if chat.tools or any(message.tool_calls or message.role == "tool" for message in chat.messages):
        raise DataError(f"{chat.where}: this conversation has tools, and vicuna knows none: use mistral-v3.")
    system = "\n\n".join(message.content for message in chat.messages if message.role == "system" and message.content)
    turns = _merged([message for message in chat.messages if message.role != "system"])
    turns = turns[next((at for at, message in enumerate(turns) if message.role == "user"), len(turns)) :]
    if not any(message.role == "assistant" and message.trained for message in turns):
        raise DataError(
            f"{chat.where}: no answer that is learned follows the first question: add one, or leave it out."
        )
    pieces = [control_piece(controls.bos)]
    head = f"{system or _VICUNA} "
    for message in turns:
        if message.role == "user":
            pieces.append(Piece(f"{head}USER: {message.content} ASSISTANT:"))
            head = ""
        else:
            # The space before the answer is the one that the tokenizer puts before every text.
            _text_or_calls(message, chat.where)
            pieces.append(Piece(message.content, message.trained))
            pieces.append(control_piece(controls.eos, message.trained))
    return pieces


# A template is a function, and a line here; the models' names say whose it is.
TEMPLATES: dict[str, Template] = {
    "mistral-v1": mistral_v1,
    "mistral-v3": mistral_v3,
    "vicuna": vicuna,
}


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """Return the template called `name`: a key of TEMPLATES, "tokenizer" for the tokenizer folder's own, or "auto".

    "auto" is mistral-v3 where the vocabulary has that template's control tokens, mistral-v1 for Mixtral-8x7B's very
    vocabulary, else the folder's own, and mistral-v1 where it has none. Raises DataError for another name, and where
    the folder's own is asked for and not there.
    """
    if name == "auto":
        name = fitting(tokenizer)
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name != "tokenizer":
        known = ["auto", *TEMPLATES, "tokenizer"]
        raise DataError(f"chat template {name!r} is unknown: use {', '.join(known)}.{nearest(name, known)}")
    source = own_source(tokenizer)
    if not source:
        raise DataError(
            f"tokenizer {tokenizer.name} has no chat_template of its own: use {', '.join(TEMPLATES)}, or put a "
            "chat_template.jinja beside it."
        )
    return JinjaTemplate(source)


def fitting(tokenizer: Tokenizer) -> str:
    """Return the name of the template that `load_template` takes for "auto"."""
    if "[TOOL_CALLS]" in controls_of(tokenizer).ids:
        return "mistral-v3"
    return "tokenizer" if tokenizer.sha256 != _MIXTRAL_8X7B and own_source(tokenizer) else "mistral-v1"


def own_source(tokenizer: Tokenizer) -> str:
    """Return the chat template that lies with a tokenizer, as jinja2; empty where there is none."""
    source: Any = tokenizer._config.get("chat_template")
    if isinstance(source, list):  # several, by name; the one for conversations is the default
        source = next((each.get("template") for each in source if each.get("name") == "default"), None)
    if "chat_template.jinja" in tokenizer._files:
        source = tokenizer._files["chat_template.jinja"].decode("utf-8", "replace")
    return source.strip() and source if isinstance(source, str) else ""


def fingerprint(template: Template, tokenizer: Tokenizer) -> str:
    """Return a SHA-256 that changes when the tokens of a conversation would: of a template's source or its doings."""
    if isinstance(template, JinjaTemplate):
        return hashlib.sha256(template.source.encode()).hexdigest()
    talk = [Message("system", "s"), *(Message(role, " a \n") for role in ("user", "user", "assistant") * 2)]
    probes = [Chat(talk, "probe")]
    if template is mistral_v3:
        call = {"id": "probe", "function": {"name": "f", "arguments": '{"x": "é"}'}}
        asked = [*talk, Message("user", "b"), Message("assistant", "", tool_calls=[call])]
        answered = [Message("tool", '{"y":1}', tool_call_id="probe"), Message("assistant", "c")]
        probes.append(Chat(asked + answered, "probe", [{"function": {"name": "f"}}]))
    controls = controls_of(tokenizer)
    done = [[dataclasses.astuple(piece) for piece in template(probe, controls)] for probe in probes]
    return hashlib.sha256(json.dumps(done).encode()).hexdigest()


def call_id(seed: str) -> str:
    """Return 9 characters of [a-zA-Z0-9] that `seed` determines: its SHA-256 as a number to base 62, lowest first."""
    number = int.from_bytes(hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest(), "big")
    letters = []
    for _ in range(9):
        number, at = divmod(number, len(_LETTERS))
        letters.append(_LETTERS[at])
    return "".join(letters)


def _learnable(chat: Chat) -> tuple[Chat, str]:
    """Return `chat` up to the assistant's last turn, and a sentence on what came after it."""
    messages = chat.messages
    if messages and messages[-1].role == "assistant" and messages[-1].trained:
        return chat, ""  # as nearly all are
    said = [at for at, message in enumerate(messages) if message.role == "assistant"]
    if not said:
        raise DataError(f"{chat.where}: the assistant says nothing in this conversation: add an answer to learn.")
    if not any(messages[at].trained for at in said):
        raise DataError(f"{chat.where}: every turn of the assistant has weight 0: give one weight 1, or leave it out.")
    left = len(messages) - 1 - said[-1]
    if not left:
        return chat, ""
    what = "the last turn comes" if left == 1 else f"the last {left} turns come"
    note = f"{chat.where}: {what} after the assistant's last one and {'is' if left == 1 else 'are'} left out."
    return dataclasses.replace(chat, messages=messages[: said[-1] + 1]), note


# Who may speak after whom, as mistral-common has it; None is the beginning.
_AFTER = {
    None: ("system", "user", "assistant"),
    "system": ("system", "user", "assistant"),
    "user": ("system", "user", "assistant"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("user", "assistant", "tool"),
}


def _mistral_turns(chat: Chat) -> tuple[str, list[Message]]:
    """Return the system prompt and the turns, neighbours of one role merged (mistral-common, normalize.py).

    Where the assistant speaks first, an empty question comes before.
    """
    before, system = None, []
    for at, message in enumerate(chat.messages, start=1):
        role = message.role
        if role not in _AFTER[before]:
            raise DataError(
                f"{chat.where}: message {at}: Mistral's templates have no {role} "
                f"{f'after {before}' if before else 'at the beginning'}: move it, or leave it out."
            )
        if role == "assistant":
            _text_or_calls(message, chat.where, at)
        elif role == "system" and message.content:
            system.append(message.content)
        before = role
    if len(chat.messages) == 1:
        raise DataError(f"{chat.where}: the assistant speaks and nobody asked: put a question before its answer.")
    turns = _merged(chat.messages)
    turns = [message for message in turns if message.role != "system"]
    return "\n\n".join(system), turns if turns[0].role == "user" else [Message("user", ""), *turns]


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Return `messages`, neighbours of one role as one turn; turns of which one is learned stay two."""
    merged: list[Message] = []
    for message in messages:
        before = merged[-1] if merged else None
        if (
            before is None
            or message.role == "tool"
            or before.role != message.role
            or (message.role == "assistant" and before.trained != message.trained)
        ):
            merged.append(message)
            continue
        content = "\n\n".join(filter(None, (before.content, message.content)))
        calls = (*before.tool_calls, *message.tool_calls)
        merged[-1] = dataclasses.replace(before, content=content, tool_calls=calls)
    return merged


def _text_or_calls(message: Message, where: str, at: int | None = None) -> None:
    if bool(message.content) == bool(message.tool_calls):
        what = "text and calls at once" if message.content else "nothing"
        here = where if at is None else f"{where}: message {at}"
        raise DataError(f"{here}: the assistant says {what}: this template wants either text or calls in a turn.")


def _assistant_v3(message: Message, where: str, controls: Controls) -> list[Piece]:
    _text_or_calls(message, where)  # again, for what merging has put together
    end = control_piece(controls.eos, message.trained)
    if not message.tool_calls:
        return [Piece(message.content.rstrip(" "), message.trained), end]
    calls = _json([_call(call, where) for call in message.tool_calls], where)
    return [control_piece("[TOOL_CALLS]", message.trained), Piece(calls, message.trained), end]


def _between(opening: str, text: str, closing: str) -> list[Piece]:
    return [control_piece(opening), Piece(text), control_piece(closing)]


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    parsed = json_or_text(arguments or "", where) if isinstance(arguments, str | None) else arguments
    return {"name": _name(function, where), "arguments": parsed, "id": _mistral_id(call.get("id"), where)}


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = tool["function"]
    described = {"description": function.get("description") or "", "parameters": function.get("parameters") or {}}
    return {"type": "function", "function": {"name": _name(function, where), **described}}


def _name(function: Mapping[str, Any], where: str) -> str:
    if not _FUNCTION_NAME.fullmatch(function["name"]):
        raise DataError(
            f"{where}: the function name {ascii(function['name'])[:80]} is none that Mistral knows: use 1 to 64 "
            "letters, digits, _ and -."
        )
    return function["name"]


def _mistral_id(given: str | None, where: str) -> str:
    if not given:
        raise DataError(f"{where}: a call or a tool's answer has no id: give both the same 9 letters or digits.")
    return given if _CALL_ID.fullmatch(given) else call_id(given)


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{where}: a call, an answer or a tool is no JSON: write plain JSON values.") from None


def _joined(system: str, content: str) -> str:
    return f"{system}\n\n{content}" if system else content
