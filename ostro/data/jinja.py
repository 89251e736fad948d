"""A tokenizer folder's own chat template: jinja2 in its sandbox, and what of the rendered text the assistant says."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ostro.data.pieces import Controls, Piece, json_or_text
from ostro.data.records import Chat, Message
from ostro.errors import DataError

# Characters that Unicode keeps for use inside a program: no text holds them, so that they can mark places in it.
_SPLIT, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = re.compile("[\ufdd0-\ufdd2]")
_ESCAPED = re.compile(r"\\ufdd[0-2]", re.IGNORECASE)
_GENERATION = re.compile(r"{%([-+]?)\s*(end)?generation\s*([-+]?)%}")


class JinjaTemplate:
    """A tokenizer's own `chat_template`, in jinja2's sandbox; made from its source.

    What the assistant says is what `{% generation %}` encloses; where the template has no such tag it is what an
    answer adds to the conversation before it and its generation prompt, up to the control token that ends it. Both
    are read off the rendered text. The clock (`strftime_now`) is left out: the same record gives the same tokens.
    """

    def __init__(self, source: str) -> None:
        """Compile `source`; raises DataError where it is no template."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source = source
        self._tagged = bool(_GENERATION.search(source))
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.filters["ostro_said"] = lambda text: f"{_OPEN}{text}{_CLOSE}"
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(_GENERATION.sub(_as_filter, source))
        except (jinja2.TemplateError, RecursionError) as error:
            raise DataError(f"the chat template cannot be read ({error}): mend it, or name another one.") from None

    def __call__(self, chat: Chat, controls: Controls) -> list[Piece]:
        """Return the pieces of `chat`; raises DataError where rendering fails or the spans cannot be told."""
        turns = [_as_dict(message, chat.where) for message in chat.messages]
        given = {"messages": _guarded(turns, controls, chat.where), "tools": None}
        if chat.tools:
            given["tools"] = _guarded(list(chat.tools), controls, chat.where)
        full = self._rendered(given, controls, chat.where)
        if self._tagged:
            full, spans = _unmarked(full, chat)
        else:
            spans = list(self._by_prefix(given, full, chat, controls))
        return _cut(full, spans, controls)

    def _rendered(self, given: Mapping[str, Any], controls: Controls, where: str, *, asking: bool = False) -> str:
        try:
            text = self._template.render(**controls.names, **given, add_generation_prompt=asking)
        except Exception as error:  # a template may raise whatever it likes
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise DataError(
                f"{where}: the chat template cannot render this ({reason}): change the record, or use another template."
            ) from None
        if _ESCAPED.search(text):
            raise DataError(
                f"{where}: the chat template escapes a control token that stands in the text, so that it cannot be "
                "kept apart: use tojson without ensure_ascii, or another template."
            )
        return text

    def _by_prefix(
        self, given: Mapping[str, Any], full: str, chat: Chat, controls: Controls
    ) -> Iterable[tuple[int, int, bool]]:
        """Yield (start, end, trained) in `full` of each answer; raises DataError where that is not certain."""
        for at, message in enumerate(chat.messages):
            if message.role != "assistant":
                continue
            turns = given["messages"]
            asked = self._rendered({**given, "messages": turns[:at]}, controls, chat.where, asking=True)
            said = self._rendered({**given, "messages": turns[: at + 1]}, controls, chat.where)
            text = said[len(asked) :]
            content = str(turns[at]["content"]).strip()
            if not (said.startswith(asked) and full.startswith(said) and text.strip().startswith(content)):
                raise DataError(
                    f"{chat.where}: what the assistant says in message {at + 1} cannot be told from the rendered chat "
                    "template: enclose it there in {% generation %} and {% endgeneration %}, or use another template."
                )
            ends = [match.end() for match in controls.pattern.finditer(text)]
            ended = ends and not text[ends[-1] :].strip()
            yield len(asked), len(asked) + (ends[-1] if ended else len(text)), message.trained


def _as_filter(tag: re.Match[str]) -> str:
    """Return the tag that encloses text with marks instead of `{% generation %}`, which jinja2 does not know."""
    word = "endfilter" if tag[2] else "filter ostro_said"
    return f"{{%{tag[1]} {word} {tag[3]}%}}"


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Write JSON as templates expect it of transformers: nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _as_dict(message: Message, where: str) -> dict[str, Any]:
    """Return a message as templates know it: OpenAI's fields, a call's arguments as an object."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = []
        for call in message.tool_calls:
            arguments = call["function"].get("arguments")
            parsed = json_or_text(arguments or "", where) if isinstance(arguments, str | None) else arguments
            function = {"name": call["function"]["name"], "arguments": parsed}
            turn["tool_calls"].append({"id": call.get("id"), "type": "function", "function": function})
    optional = {"tool_call_id": message.tool_call_id, "name": message.name}
    return turn | {key: value for key, value in optional.items() if value is not None}


def _guarded(value: Any, controls: Controls, where: str) -> Any:
    """Return `value` with every control token in its texts split by a mark, so that it is found as text again."""
    if isinstance(value, str):
        if _MARKS.search(value):
            raise DataError(f"{where}: a text holds U+FDD0, U+FDD1 or U+FDD2, which are no characters: remove them.")
        return controls.starts.sub(rf"\1{_SPLIT}", value)
    if isinstance(value, Mapping):
        return {key: _guarded(each, controls, where) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_guarded(each, controls, where) for each in value]
    return value


def _unmarked(full: str, chat: Chat) -> tuple[str, list[tuple[int, int, bool]]]:
    """Return the text without the marks of `{% generation %}`, and what they enclosed as (start, end, trained)."""
    said = [message.trained for message in chat.messages if message.role == "assistant"]
    parts = re.split(f"([{_OPEN}{_CLOSE}])", full)
    if parts[1::2] != [_OPEN, _CLOSE] * len(said):
        raise DataError(
            f"{chat.where}: the chat template encloses {parts.count(_OPEN)} turns in {{% generation %}}, and the "
            f"assistant speaks {len(said)} times: enclose each of its turns once, or use another template."
        )
    ends = list(itertools.accumulate(map(len, parts[::2])))
    return "".join(parts[::2]), [(ends[2 * at], ends[2 * at + 1], trained) for at, trained in enumerate(said)]


def _cut(full: str, spans: Sequence[tuple[int, int, bool]], controls: Controls) -> list[Piece]:
    """Return a rendered text as pieces: control tokens by themselves, text cut where what is learned begins or ends."""
    pieces: list[Piece] = []
    borders = sorted({edge for start, end, _ in spans for edge in (start, end)})
    learned = [(start, end) for start, end, trained in spans if trained]
    at = 0
    for found in [*controls.pattern.finditer(full), None]:
        stop = found.start() if found else len(full)
        edges = [at, *(edge for edge in borders if at < edge < stop), stop]
        runs = [full[one:two].replace(_SPLIT, "") for one, two in itertools.pairwise(edges)]
        lead = "" if controls.prefixed or at == 0 else "\n"  # what stands before is taken off again
        whole, start = lead + "".join(runs), len(lead)
        for edge, text in zip(edges, runs, strict=False):
            if text:
                trained = any(one <= edge < two for one, two in learned)
                alone = len(whole) == len(text)
                pieces.append(Piece(text, trained, whole=None if alone else whole, start=start))
            start += len(text)
        if found:
            name = found[0] if found[0] in controls.ids else found[0].strip()
            edge = found.start() + found[0].index(name)
            pieces.append(Piece(name, any(one <= edge < two for one, two in learned), control=True))
            at = found.end()
    while [piece.text for piece in pieces[:2]] == [controls.bos] * 2 and pieces[1].control:
        del pieces[0]
    return pieces
