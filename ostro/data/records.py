"""What a source yields: a text, a conversation, or tokens that somebody else made. Each knows where it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]


@dataclasses.dataclass(frozen=True)
class Text:
    """A document to learn as a whole. `where` is "file line 12" or the file, as an error names it."""

    text: str
    where: str


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `trained` is whether an assistant's turn is learned. `tool_calls` are OpenAI's: {"id", "function": {"name",
    "arguments"}}, arguments a JSON string or an object; `tool_call_id` names the call that a tool's answer is to.
    """

    role: Role
    content: str
    trained: bool = True
    tool_calls: Sequence[Mapping[str, Any]] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation, to be rendered by a template; `tools` are OpenAI's function descriptions."""

    messages: Sequence[Message]
    where: str
    tools: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A record that is tokens already: ids [n] and, where only some are learned, trained bool [n]."""

    ids: np.ndarray
    where: str
    trained: np.ndarray | None = None


Record = Text | Chat | Tokens


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of work: one kind of source in a span of bytes of a file (`stop` None: to its end).

    Spans are cut where records begin, by a rule that looks at sizes and bytes alone: the same files give the same
    units whoever works on them. `start` is where a record begins, `first` the number of the first record or line.
    """

    path: str
    kind: str
    start: int = 0
    stop: int | None = None
    first: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether this is all of its file."""
        return self.start == 0 and self.stop is None
