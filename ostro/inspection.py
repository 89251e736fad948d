"""What a checkpoint holds, for a person to read: by kind of parameter, with whatever is wrong about it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ostro import config, weights
from ostro.errors import ConfigError, WeightsError, nearest
from ostro.log import size
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import Hints, Reader, TensorInfo
from ostro.weights.mapped import TensorFile
from ostro.weights.store import pieces
from ostro.weights.stored import StoredReader

_READ_ROWS = 1024  # of a matrix, looked at together


@dataclasses.dataclass
class Row:
    """One kind of parameter, or one pattern of names: how many tensors, their shape, types, bytes, and bad values."""

    name: str
    shape: tuple[int, ...]
    num_tensors: int = 0
    dtypes: set[str] = dataclasses.field(default_factory=set)
    num_bytes: int = 0
    num_nan: int = 0
    num_infinite: int = 0
    largest: float = 0.0

    def add(self, info: TensorInfo) -> None:
        """Count a tensor."""
        self.num_tensors += 1
        self.dtypes.add(str(info.dtype).removeprefix("torch."))
        self.num_bytes += info.num_bytes

    def look_at(self, values: Tensor) -> None:
        """Count what is no number in some of its values, and note the largest of the others."""
        largest = values.abs().max().item() if values.numel() else 0.0
        if not largest < float("inf"):  # NaN is not less either
            nan, infinite = values.isnan(), values.isinf()
            self.num_nan += int(nan.sum())
            self.num_infinite += int(infinite.sum())
            sound = values[~(nan | infinite)]
            largest = sound.abs().max().item() if sound.numel() else 0.0
        self.largest = max(self.largest, largest)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A checkpoint as it is: `faults` are sentences, none where it is sound; `others` is what is not the model's."""

    summary: str
    notes: tuple[str, ...] = ()
    model: ModelConfig | None = None
    rows: tuple[Row, ...] = ()
    others: tuple[Row, ...] = ()
    files: tuple[tuple[Path, int], ...] = ()
    faults: tuple[str, ...] = ()


def hints_of(format: str | None, model: str | None, strategy: Path | None, step: int | None) -> Hints:
    """Return what the options of a command line say about a source; ConfigError for what they cannot mean."""
    known = [name for name in weights.FORMATS if name != "random"]
    if format is not None and format not in known:
        raise ConfigError(f"--from {format} is not one of {', '.join(known)}.{nearest(format, known)}")
    if strategy is not None and not strategy.exists():
        raise ConfigError(f"--strategy {strategy} does not exist: give the folder of the strategy files, or one file.")
    return Hints(format, config.model_config(model) if model is not None else None, strategy, step)


def described(reader: Reader) -> str:
    """Return format, size and types of a checkpoint in a few words."""
    infos = reader.names().values()
    words = " and ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))
    num_bytes = sum(info.num_bytes for info in infos)
    return f"{reader.format}, {layout.num_parameters(reader.model):,} parameters in {words}, {size(num_bytes)}"


def inspect(path: Path, hints: Hints, *, quick: bool = False) -> Inspection:
    """Return what a checkpoint holds; `quick` leaves its values and checksums unread.

    What cannot be opened as a model is shown by the names in its files.
    """
    try:
        reader = weights.open_reader(path, hints, check=False)
    except WeightsError as error:
        files = list(_tensor_files(path))
        if not files:
            raise
        return _unopened(files, str(error))
    faults = list(reader.faults()) if isinstance(reader, StoredReader) else []
    others = _patterns(reader.others) if isinstance(reader, StoredReader) else ()
    rows = _kinds(reader)
    if not quick:
        faults += _values(reader, rows)
    found = sorted({*_paths(reader)}, key=_natural)
    files = tuple((file, file.stat().st_size) for file in found)
    summary = described(reader) if not faults or _is_complete(reader) else f"{reader.format}, not whole"
    return Inspection(summary, tuple(reader.notes), reader.model, tuple(rows.values()), others, files, tuple(faults))


def _kinds(reader: Reader) -> dict[str, Row]:
    """Return a row for each kind of parameter, of the tensors that are there."""
    rows: dict[str, Row] = {}
    for parameter in _sound(reader):
        row = rows.setdefault(parameter.kind.name, Row(parameter.kind.name, parameter.shape))
        row.add(_info(reader, parameter))
    return rows


def _values(reader: Reader, rows: Mapping[str, Row]) -> list[str]:
    """Look at every value, and at checksums and copies; return what is wrong."""
    faults = []
    for parameter in _sound(reader):
        row = rows[parameter.kind.name]
        before = row.num_nan + row.num_infinite
        for stack in pieces(parameter):
            for values in reader.read(parameter.name, stack).split(_READ_ROWS):
                row.look_at(values)
        if row.num_nan + row.num_infinite > before and len(faults) < 8:
            faults.append(
                f"{parameter.name} holds NaN or infinity in {row.num_nan + row.num_infinite - before} values."
            )
    if isinstance(reader, StoredReader):
        try:
            reader.certify()
        except WeightsError as error:
            faults.append(str(error))
    return faults


def _sound(reader: Reader) -> Iterator[layout.Parameter]:
    """Yield the parameters that can be read."""
    if isinstance(reader, StoredReader):
        return reader.sound()
    return layout.parameters(reader.model)


def _info(reader: Reader, parameter: layout.Parameter) -> TensorInfo:
    return reader.info(parameter) if isinstance(reader, StoredReader) else reader.names()[parameter.name]


def _is_complete(reader: Reader) -> bool:
    return len(list(_sound(reader))) == len(layout.table(reader.model))


def _paths(reader: Reader) -> Iterable[Path]:
    """Return the files of a checkpoint."""
    if isinstance(reader, StoredReader):
        paths = {file.path for file in (*reader.files.values(), *reader.others.values())}
    else:
        paths = {Path(getattr(reader, "path", "."))}
    for path in paths:
        if path.is_file():
            yield path
        else:
            yield from (file for file in path.rglob("*") if file.is_file() and file.suffix in _SUFFIXES)


def _natural(path: Path) -> list[str]:
    """Return a key that sorts rank_10 behind rank_9."""
    return [part.zfill(12) for part in re.split(r"(\d+)", str(path))]


_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf", ".distcp")


def _unopened(files: list[TensorFile], fault: str) -> Inspection:
    held: dict[str, TensorFile] = {}
    for file in files:
        held |= dict.fromkeys(file.infos, file)
    listed = tuple((file.path, file.path.stat().st_size) for file in files)
    summary = f"{len(files)} {'file' if len(files) == 1 else 'files'} of tensors that could not be opened as a model"
    return Inspection(summary, others=_patterns(held), files=listed, faults=(fault,))


def _patterns(files: Mapping[str, TensorFile]) -> tuple[Row, ...]:
    """Return a row for each pattern of names, numbers left out."""
    rows: dict[str, Row] = {}
    for name, file in files.items():
        info = file.infos[name]
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "N", name)
        rows.setdefault(pattern, Row(pattern, info.shape)).add(info)
    return tuple(rows.values())


def _tensor_files(path: Path) -> Iterator[TensorFile]:
    """Yield the files of tensors at a path that can be opened."""
    from ostro.weights.ckpt_file import CkptFile
    from ostro.weights.gguf_file import GgufFile
    from ostro.weights.pickle_file import PickleFile
    from ostro.weights.safetensors_file import SafetensorsFile

    openers = {".ckpt": CkptFile, ".safetensors": SafetensorsFile, ".gguf": GgufFile}
    openers |= dict.fromkeys((".bin", ".pt", ".pth"), PickleFile)
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.suffix in openers and file.is_file():
            try:
                yield openers[file.suffix](file)
            except WeightsError:
                continue


def rendered(found: Inspection, *, quick: bool) -> str:
    """Return an inspection as text: a table by kind, then what else there is and what is wrong."""
    lines = [found.summary, *(f"  {note}" for note in found.notes)]
    if found.model is not None:
        fields = {k: v for k, v in found.model.as_fields().items() if v is not None}
        lines.append("  " + "  ".join(f"{name}={value}" for name, value in fields.items()))
    for title, rows in (("", found.rows), ("beside the model:", found.others)):
        if rows and title and found.model is not None:
            lines.append(title)
        width = max((len(row.name) for row in rows), default=0)
        for row in rows:
            shape = "×".join(map(str, row.shape)) or "scalar"
            text = f"  {row.name:<{width}}  {row.num_tensors:>4} × {shape:<18} {'/'.join(sorted(row.dtypes)):<9}"
            text += f" {size(row.num_bytes):>9}"
            if rows is found.rows and not quick:
                text += f"  largest {row.largest:.3g}"
                text += f"  {row.num_nan} NaN, {row.num_infinite} infinite" if row.num_nan + row.num_infinite else ""
            lines.append(text)
    total = sum(num_bytes for _, num_bytes in found.files)
    lines.append(f"{len(found.files)} {'file' if len(found.files) == 1 else 'files'}, {size(total)}")
    around = {file.parent for file, _ in found.files}
    for file, num_bytes in found.files[:_FILES_SHOWN]:
        lines.append(f"  {file.name if len(around) == 1 else f'{file.parent.name}/{file.name}'}  {size(num_bytes)}")
    if len(found.files) > _FILES_SHOWN:
        lines.append(f"  … and {len(found.files) - _FILES_SHOWN} more")
    return "\n".join(lines)


_FILES_SHOWN = 24
