"""What failed, was killed or has changed: begun anew or gone on with, and never taken for what it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from preparations import (
    contents,
    left_behind,
    own_template,
    stamps,
    write_talks,
)

from ostro.data import prepare as room
from ostro.data import sources
from ostro.data.megatron import MegatronWriter
from ostro.data.prepare import Hands, prepare, prepared
from ostro.data.records import Unit
from ostro.data.shards import open_shards
from ostro.data.tasks import Settings
from ostro.data.tokenizer import Tokenizer
from ostro.errors import DataError


def test_a_disk_that_was_away_costs_nothing_and_a_mended_source_begins_anew(
    tmp_path: Path, many: Path, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    out, partial = tmp_path / "data", tmp_path / ".data.partial"
    real = sources.read

    def away(unit: Unit):
        if unit.path.endswith("9.txt"):
            raise DataError(f"{unit.path} cannot be read: Input/output error.")
        return real(unit)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read", away)
        with pytest.raises(DataError, match="Input/output error"):
            prepare([many], out, tokenizer=v1, hands=Hands(1))
    finished = stamps(partial)
    assert finished
    (many / "9.txt").write_text("Mended.")  # and the others' work is of another plan
    prepare([many], out, tokenizer=v1, hands=Hands(1))
    prepare([many], tmp_path / "fresh", tokenizer=v1, hands=Hands(1))
    assert contents(out) == contents(tmp_path / "fresh")
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "read", away)
        with pytest.raises(DataError, match="Input/output error"):
            prepare([many], out, tokenizer=v1, hands=Hands(1))
    finished = stamps(partial)
    prepare([many], out, tokenizer=v1, hands=Hands(1))
    kept = stamps(out)
    assert finished.items() >= {name: kept[name] for name in finished if name in kept}.items()
    assert contents(out) == contents(tmp_path / "fresh")
    assert left_behind(tmp_path) == []


def test_a_note_that_a_power_cut_emptied_is_made_again(tmp_path: Path, many: Path, v1: Tokenizer):
    whole = prepare([many], tmp_path / "whole", tokenizer=v1, hands=Hands(1))
    assert prepare([many], tmp_path / "data", tokenizer=v1, hands=Hands(1, (0, 2))) is None
    (tmp_path / ".data.partial" / "task-00000.json").write_text("")
    assert prepare([many], tmp_path / "data", tokenizer=v1, hands=Hands(1)) == whole
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_another_index_of_the_same_tokens_is_another_source(tmp_path: Path, v1: Tokenizer):
    for name, cut in (("a", 3), ("b", 4)):
        with MegatronWriter(tmp_path / name) as megatron:
            megatron.append(list(range(1, cut + 1)))
            megatron.append(list(range(cut + 1, 8)))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    first = prepare([tmp_path / "a"], tmp_path / "data", tokenizer=v1)
    assert first is not None
    assert [Path(source["path"]).name for source in first.sources] == ["a.bin", "a.idx"]
    cached = prepared([tmp_path / "a"], tmp_path / "cache", tokenizer=v1, settings=Settings())
    shutil.copy(tmp_path / "b.idx", tmp_path / "a.idx")
    with pytest.raises(DataError, match="of other or changed sources"):
        prepare([tmp_path / "a"], tmp_path / "data", tokenizer=v1)
    again = prepared([tmp_path / "a"], tmp_path / "cache", tokenizer=v1, settings=Settings())
    assert [open_shards(folder).document_ends.tolist() for folder in (cached, again)] == [[3, 7], [4, 7]]


def test_the_kept_tokenizer_is_of_its_template(tmp_path: Path, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Killed before the plan is written, and the template changed: the folder that was kept is not taken."""
    talks, settings = write_talks(tmp_path / "talks.jsonl"), Settings(template="tokenizer")
    one = own_template(tmp_path / "one", "{{ eos_token }}", v1)
    two = own_template(tmp_path / "two", "!{{ eos_token }}", v1)
    with monkeypatch.context() as patch:
        patch.setattr(room, "_tasks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare([talks], tmp_path / "data", tokenizer=one, settings=settings)
    assert (tmp_path / ".data.partial").exists()
    prepare([talks], tmp_path / "data", tokenizer=two, settings=settings)
    prepare([talks], tmp_path / "fresh", tokenizer=two, settings=settings)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_a_place_that_cannot_be_replaced_is_refused_at_once(
    tmp_path: Path, corpus: Path, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert prepare([corpus], tmp_path / "link", tokenizer=v1)
    assert open_shards(tmp_path / "real").num_tokens
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match=r"\. cannot be replaced as a whole: name a new folder inside it"):
        prepare([corpus], ".", tokenizer=v1)


def test_bad_records_far_into_a_file_are_named_by_line(tmp_path: Path, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "_LEAST_BYTES", 400)
    lines = [
        {"messages": [{"role": "user", "content": f"{at}"}, {"role": "assistant", "content": "a"}]} for at in range(90)
    ]
    lines[70]["messages"].pop()
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(sources.units([tmp_path / "c.jsonl"])) > 5
    with pytest.raises(DataError, match=r"c\.jsonl line 71: .*assistant"):
        prepare([tmp_path / "c.jsonl"], tmp_path / "data", tokenizer=v1, hands=Hands(1))
