"""Damaged checkpoints of every format, some hundred a reader, and readers that a fuzzer has to find fault with."""

from __future__ import annotations

import dataclasses
import mmap
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _fuzz_files import MODEL, SAMPLES
from _mutations import mutate
from fuzz_readers import CORRECT, EXPLAINED, FAILED, REFUSED, Target, fuzz, make_target, original_of

from ostro.degrees import Degrees
from ostro.errors import WeightsError
from ostro.weights import Hints, RandomReader, Reader, Where, dcp, open_reader
from ostro.weights.reshard import Box, shared
from ostro.weights.store import printable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits on memory are Linux's")

FOLDERS = ("mindspore-ranks", "mindspore-ranks-json", "dcp", "dcp-sharded", "dcp-train")  # slower, many files


@pytest.mark.parametrize("name", SAMPLES)
def test_a_damaged_checkpoint_is_refused_or_read_correctly(name: str) -> None:
    results = fuzz(make_target(name, seed=1), 60 if name in FOLDERS else 120)
    failures = [result for result in results if result["outcome"] == FAILED]
    assert not failures, failures[:3]
    assert 2 * sum(result["outcome"] == REFUSED for result in results) >= len(results)


def test_a_mutation_is_the_same_again_and_differs_from_the_original() -> None:
    files = make_target("mindspore").sample.files
    drawn = [mutate(files, Random(seed)) for seed in range(200)]
    assert drawn == [mutate(files, Random(seed)) for seed in range(200)]
    assert all(any(files[name].data != data for name, data in mutation.changed.items()) for mutation in drawn)
    assert len({mutation.what for mutation in drawn}) > 12


@dataclasses.dataclass(frozen=True)
class Spoilt:
    """A reader whose tensors pass through `spoil`."""

    source: Reader
    spoil: Callable[[Tensor, Where], Tensor]

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def read(self, name: str, where: Where = ()) -> Tensor:
        return self.spoil(self.source.read(name, where), where)


def spoilt(spoil: Callable[[Tensor, Where], Tensor]) -> Callable[[Path, Hints], Reader]:
    return lambda path, hints: Spoilt(open_reader(path, hints), spoil)


def greedy(path: Path, hints: Hints) -> Reader:
    try:
        bytearray(1 << 30)
    except MemoryError as error:
        raise WeightsError("the file is damaged.") from error
    return open_reader(path, hints)


def wasteful(path: Path, hints: Hints) -> Reader:
    mmap.mmap(-1, 48 << 20).close()  # of the system: malloc may have as much lying about from the tests before
    raise WeightsError("the file is damaged.")


def dying(path: Path, hints: Hints) -> Reader:
    os.kill(os.getpid(), signal.SIGSEGV)
    return open_reader(path, hints)


def careless(path: Path, hints: Hints) -> Reader:
    try:
        return open_reader(path, hints)
    except WeightsError:
        raise KeyError("dtype") from None


def chatty(path: Path, hints: Hints) -> Reader:
    try:
        return open_reader(path, hints)
    except WeightsError as error:
        raise WeightsError(f"{error}\nand more.") from None


def hanging(path: Path, hints: Hints) -> Reader:
    time.sleep(9)
    return open_reader(path, hints)


BROKEN = {
    "another exception": (careless, "KeyError"),
    "two lines": (chatty, "no sentence to print"),
    "memory, refused by the system": (greedy, "memory was asked for"),
    "memory, while there is some": (wasteful, "MiB"),
    "a crash": (dying, "the process died"),
    "no answer": (hanging, "Slow: no answer in 0.5 s"),
    "values from nowhere": (spoilt(lambda held, where: held + 1), "values that the files have not"),
    "values of no write": (spoilt(lambda held, where: torch.empty_like(held)), "values that the files have not"),
    "a slice of something else": (spoilt(lambda held, where: held.flip(0) if where else held), "not a slice of it"),
    "another dtype": (spoilt(lambda held, where: held.double()), "the model's"),
    "another shape": (spoilt(lambda held, where: held[:1]), "the model's"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_reader_is_found_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_broken, said = BROKEN[what]
    sound = []

    def open_sound_first(path: Path, hints: Hints) -> Reader:
        """The first one is the original, as which the others are judged."""
        sound.append(path)
        return (open_reader if len(sound) == 1 else open_broken)(path, hints)

    target = dataclasses.replace(make_target("hf"), open=open_sound_first, seconds=0.5)
    results = fuzz(target, 1 if what in ("no answer", "a crash") else 6)
    failures = [result for result in results if result["outcome"] == FAILED]
    assert failures
    assert all(said in failure["said"] for failure in failures), failures


def test_what_a_mutation_explains_is_counted_by_itself() -> None:
    target: Target = make_target("hf")
    config = target.sample.files["config.json"]
    other = config.data.replace(b'"rope_theta": 1000000.0', b'"rope_theta": 5000000.0')
    assert other != config.data

    def open_changed(path: Path, hints: Hints) -> Reader:
        if (path / "config.json").exists() and (path / "model.safetensors").exists():
            (path / "config.json").write_bytes(other if calls else config.data)
        calls.append(path)
        return open_reader(path, hints)

    calls: list[Path] = []
    outcomes = {result["outcome"] for result in fuzz(dataclasses.replace(target, open=open_changed), 24)}
    assert EXPLAINED in outcomes
    assert not outcomes & {FAILED, CORRECT}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), max_size=5))
def test_parts_that_share_an_element_are_found(drawn: list[tuple[int, int, int, int]]) -> None:
    boxes = [Box((a, b), (m, n)) for a, b, m, n in drawn]
    marked = torch.zeros(8, 8, dtype=torch.int32)
    for box in boxes:
        marked[box.where] += 1
    found = shared(boxes)
    assert (found is not None) == bool((marked > 1).any())
    assert found is None or found[0].overlap(found[1])


def moved(folder: Path, rows: int | None) -> Path:
    """Write a checkpoint of four ranks; the second part of a matrix is said to be so many rows further, or nowhere."""
    dcp.write(RandomReader(MODEL), folder, degrees=Degrees(fsdp=4))
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    name = "model.lm_head.weight"
    second = sorted(index.offset for index in metadata.storage_data if index.fqn == name)[1]
    offset = None if rows is None else torch.Size((second[0] + rows, 0))
    index = next(index for index in metadata.storage_data if index.fqn == name and index.offset == second)
    metadata.storage_data[dataclasses.replace(index, offset=offset)] = metadata.storage_data.pop(index)
    for chunk in metadata.state_dict_metadata[name].chunks:
        chunk.offsets = offset if offset is not None and chunk.offsets == second else chunk.offsets
    file.write_bytes(pickle.dumps(metadata))
    return folder


def test_a_training_checkpoint_whose_parts_overlap_and_leave_a_gap_is_refused(tmp_path: Path) -> None:
    """As many values as there should be, and yet some are nowhere."""
    with pytest.raises(WeightsError, match=r"holds parts of model\.lm_head\.weight that overlap: "):
        open_reader(moved(tmp_path / "a", 1))


def test_a_part_of_several_that_does_not_say_which_is_refused(tmp_path: Path) -> None:
    """It would be taken for the first of them."""
    with pytest.raises(WeightsError, match=r"has no box of model\.lm_head\.weight at None: "):
        open_reader(moved(tmp_path / "a", None))


UNPRINTABLE = {
    ("hf", "model.safetensors"): r"has a tensor named 'model\.norm\\nweight'",
    ("mindspore", "mixtral.ckpt"): r"starts an entry named 'model\.norm_\\nut\.weight'",
    ("gguf-bf16", "model.gguf"): r"has a tensor named 'output_norm\\nweight'",
}


@pytest.mark.parametrize(("name", "file"), UNPRINTABLE)
def test_a_name_with_a_line_end_is_damage(name: str, file: str, tmp_path: Path) -> None:
    target = make_target(name)
    original_of(target, tmp_path)
    data = target.sample.files[file].data
    for old, new in (
        (b'"model.norm.weight"', rb'"model.norm\nweight"'),
        (b"output_norm.weight", b"output_norm\nweight"),
        (b"model.norm_out.weight", b"model.norm_\nut.weight"),
    ):
        data = data.replace(old, new)
    if file.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little") + len(data) - len(target.sample.files[file].data)
        data = length.to_bytes(8, "little") + data[8:]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(WeightsError, match=UNPRINTABLE[name, file]) as caught:
        open_reader(tmp_path)
    assert str(caught.value).isprintable()


def test_what_cannot_be_printed_is_escaped() -> None:
    assert printable("a\nb\x1b[2J\ud800é×") == "a\\nb\\x1b[2J\\ud800é×"
