"""Small corpora, and what a preparation left: for the tests of the engine."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from ostro.data.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["The wind rose.", "Grüße, 😀!\n\n  two\n", "three " * 50]
TALKS = [
    [("user", "How are you?"), ("assistant", "Well, thanks."), ("user", "And now?"), ("assistant", "Still well.")],
    [("system", "Be brief."), ("user", "</s> is text"), ("assistant", "So it is: </s>.")],
    [("user", "ünï"), ("assistant", "cödé")],
]
WORDS = ["wind", "▁", "  ", "rose\n", "字典", "</s>", "naïve", "1.5e-3", "\t"]

load = functools.cache(load_tokenizer)


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def write_talks(path: Path) -> Path:
    """Write TALKS, the first answer of which is not learned."""
    records = [{"messages": [{"role": role, "content": said} for role, said in talk]} for talk in TALKS]
    records[0]["messages"][1]["weight"] = 0  # type: ignore[assignment]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def left_behind(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "partial" in path.name)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("t*-*.npy")}


def own_template(folder: Path, answer: str, v1: Tokenizer) -> Tokenizer:
    """Return v1 with a chat template of its own, which writes `answer` after what the assistant says."""
    v1.save(folder)
    after = "{% if m.role == 'assistant' %}" + answer + "{% endif %}"
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}" + after + "{% endfor %}"
    )
    return load_tokenizer(folder)
