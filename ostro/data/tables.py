"""Records from tables: Parquet files, and data sets of the Hugging Face Hub written down as JSON Lines."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ostro.data.beside import Beside, disk_errors
from ostro.data.json_files import fields, kind_of_fields, made
from ostro.data.records import Unit
from ostro.data.text_files import Item, unreadable
from ostro.errors import DataError

_FIELDS = ("text", "messages", "conversations", "prompt", "completion", "instruction", "input", "output")
_FIELDS += ("history", "system", "tools")
_ROWS = 64  # at a time: the texts of so many rows are in memory
_HUB = re.compile(r"hf://(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%:+-]+))?", re.ASCII)


def read_parquet(unit: Unit, kind: str | None = None) -> Iterator[Item]:
    """Yield the rows of the row groups that begin in the unit's span; their columns are the fields of JSON's records.

    `kind` None is found by the names of the columns. Raises DataError for a file that is no whole Parquet file.
    """
    with _guarded(unit.path):
        file = _opened(unit.path)
        names = [str(name) for name in file.schema_arrow.names]
        kind = kind or kind_of_fields(dict.fromkeys(names))
        if kind is None:
            raise DataError(
                f"{unit.path} has the columns {fields(dict.fromkeys(names))}, and none of text, messages, "
                "conversations, prompt and completion, instruction and output: rename the one that holds the text."
            )
        wanted = [name for name in names if name in (("text",) if kind == "jsonl" else _FIELDS)]
        number = 0
        is_whole = unit.is_whole
        # Of a file in one piece nobody has checked the groups, and nobody needs to know where they begin.
        starts = [0] * file.metadata.num_row_groups if is_whole else _group_starts(file)
        for group, start in enumerate(starts):
            if unit.start <= start and (unit.stop is None or start < unit.stop):
                for row in _rows(file, group, wanted):
                    number += 1
                    yield _made(kind, row, f"{unit.path} record {number}")
            else:
                number += file.metadata.row_group(group).num_rows


def parquet_cuts(path: str, unit_bytes: int) -> list[int]:
    """Return the offsets at which row groups begin, one for each `unit_bytes` at most, but the first."""
    with _guarded(path):
        file = _opened(path)
        for group in range(file.metadata.num_row_groups):
            # Asked where a column of damaged size statistics is, pyarrow ends the process; asked for a row, it raises.
            next(file.iter_batches(batch_size=1, row_groups=[group]), None)
        starts = _group_starts(file)
    cuts, last = [], 0
    for start in starts if starts == sorted(set(starts)) else []:
        if start // unit_bytes > last:
            cuts.append(start)
            last = start // unit_bytes
    return cuts


def is_hub_id(text: str) -> bool:
    """Return whether `text` names a data set of the Hub: hf://OWNER/NAME, perhaps /CONFIG, perhaps :SPLIT."""
    return text.startswith("hf://")


def read_hub(name: str, folder: str | Path) -> Path:
    """Return a JSONL file in `folder` with the records of hf://OWNER/NAME[/CONFIG][:SPLIT], fetched where not there.

    SPLIT is train where it is not said. The file is written beside and renamed, so it is whole or not there. Raises
    DataError where the data set cannot be had, or holds what JSON has no word for.
    """
    found = _HUB.fullmatch(name)
    if found is None:
        raise DataError(f"{name!r} is no data set's name: write hf://OWNER/NAME, hf://OWNER/NAME:SPLIT.")
    config, split = found["config"], found["split"] or "train"
    parts = [*found["id"].split("/"), config or "default", split]
    target = Path(folder) / ("--".join(re.sub(r"[^\w.-]", "_", part) for part in parts) + ".jsonl")
    if target.is_file():
        return target
    beside = Beside([target])
    try:
        with disk_errors(target):
            _write(beside.path(target), _fetched(name, found["id"], config, split), name)
        beside.keep()
    finally:
        beside.drop()
    return target


def _fetched(name: str, identity: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"{name} is fetched with the package datasets: pip install 'ostro[datasets]'.") from None
    try:
        yield from load_dataset(identity, config, split=split, streaming=True)
    except Exception as error:  # whatever the network, the Hub and the data set's own files have to say
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{name} cannot be fetched ({reason}): check the name, the split and the network.") from None


def _write(path: Path, rows: Iterable[dict[str, Any]], name: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows, start=1):
            if kind_of_fields(row) is None:
                raise DataError(
                    f"{name} record {number}: it has {fields(row)}, and none of text, messages, conversations, prompt "
                    "and completion, instruction and output: prepare another data set."
                )
            try:
                line = json.dumps(_without_nulls({key: row[key] for key in row if key in _FIELDS}), ensure_ascii=False)
                file.write(line + "\n")
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{name} record {number}: it is not JSON ({error}): leave this data set out.") from None


def _rows(file: Any, group: int, names: list[str]) -> Iterator[dict[str, Any] | DataError]:
    """Yield the rows of a row group; one that cannot be turned into Python's values gives the reason."""
    for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=names):
        try:
            yield from batch.to_pylist()
            continue
        except UnicodeDecodeError:  # one of them
            pass
        for at in range(batch.num_rows):
            try:
                yield from batch.slice(at, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield DataError(f"{error.reason} (0x{error.object[error.start]:02x})")


def _made(kind: str, row: dict[str, Any] | DataError, where: str) -> Item:
    if isinstance(row, DataError):
        return DataError(f"{where}: a string in it is not UTF-8, {row}: mend it, or leave the record out.")
    return made(kind, row if kind == "jsonl" else _without_nulls(row), where)


def _without_nulls(value: Any) -> Any:
    """Return `value` without the fields that a column must have for every row, and that this one has not."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _opened(path: str) -> Any:
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    with open(path, "rb"):  # says in words what pyarrow would say of a file that is not there
        pass
    return pyarrow.parquet.ParquetFile(path, memory_map=True, buffer_size=1 << 20, pre_buffer=False)


def _group_starts(file: Any) -> list[int]:
    """Return the offset in the file at which each row group begins."""
    groups = (file.metadata.row_group(at) for at in range(file.metadata.num_row_groups))
    return [min(map(_column_start, map(group.column, range(group.num_columns)))) for group in groups]


def _column_start(column: Any) -> int:
    first = column.dictionary_page_offset if column.has_dictionary_page else None
    return min(first, column.data_page_offset) if first else column.data_page_offset


@contextlib.contextmanager
def _guarded(path: str) -> Iterator[None]:
    """Turn what pyarrow says of a file, and that it is not there, into a sentence."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"{path} is a Parquet file, which needs the package pyarrow: pip install 'ostro[parquet]'."
        ) from None
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        raise unreadable(path, error) from None
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        # It repeats bytes of the file as they are; a control character among them would reach the terminal.
        said = "".join(
            letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(str(error).split())
        )
        reason = (said or type(error).__name__)[:160].rstrip(".")
        raise DataError(f"{path} is no whole Parquet file ({reason}): fetch it again.") from None
