"""Reads a page of ours strictly: every element is closed, and nothing comes from elsewhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

_VOID = {"meta", "link", "img", "br", "input"}
_PATH = re.compile(r"(?:[MLhvH]|[-\d.]+|\s|,|[zZ])*")


class Page(HTMLParser):
    """`texts` is what each element said by tag, `ids` the ids, `data` every JSON block, `faults` what is wrong."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.data: list[object] = []
        self.faults: list[str] = []
        self.feed(source)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag, _ in self.open]
        ids = [fields["id"] for _, fields in self.elements if "id" in fields]
        self.ids = set(ids)
        self.faults += [f"id {name} twice" for name in self.ids if ids.count(name) > 1]
        # Only namespaces and text may look like an address; a page of ours has neither.
        self.faults += re.findall(r"(?:src|href)=[\"'](?!data:)[^\"']*|url\([^)]*\)|@import[^;]*", source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = {name: value or "" for name, value in attrs}
        self.elements.append((tag, fields))
        if len(fields) != len(attrs):
            self.faults.append(f"<{tag}> names an attribute twice")
        if tag == "img" and not fields.get("alt"):
            self.faults.append("an image without words")
        if tag == "path" and not (_PATH.fullmatch(fields["d"]) and "n" not in fields["d"]):
            self.faults.append(f"a path that is none: {fields['d'][:80]}")
        if tag not in _VOID:
            self.open.append((tag, fields))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1][0] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1][0] if self.open else 'nothing'}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            tag, fields = self.open[-1]
            self.texts.append((tag, data))
            if fields.get("type") == "application/json":
                self.data.append(json.loads(data))

    def said(self, tag: str) -> list[str]:
        """Return what was written directly in elements of a tag."""
        return [text for name, text in self.texts if name == tag and text.strip()]
