"""Token shards on disk: `.npy` files one can map into memory, and a JSON manifest that says what they are.

A folder holds tokens-NNNNN.npy, one stream cut anywhere; trained-NNNNN.npy beside those of which only some tokens are
learned (bool, one a token); documents.npy, int64 [num_documents, 2]: where each document ends in the stream, and the
bytes of its text.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ostro.errors import DataError

FORMAT = "ostro-tokens-2"
_MANIFEST = "manifest.json"
_FEW_FILES = 1024  # that everything else may have open
_FILE = {"name", "num_tokens", "num_trained"}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of token shards holds; `files` and `sources` are lists of dicts, as in manifest.json.

    `files`: name, num_tokens, num_trained. `sources`: path, kind, num_bytes, sha256. `num_bytes` counts the UTF-8 bytes
    of all texts, `num_trained` the tokens that are learned, `num_unlearned` the documents of which none is,
    `num_repeats` the records that were left out because they equal an earlier one. `key` is a hash of all that decided
    what came out, the sources' times of change included. `encoder` made the ids (all of them are those of the package
    tokenizers), `settings` are the rest of what decided them.
    """

    format: str
    key: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    unk_token_id: int | None
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    num_trained: int
    num_unlearned: int
    num_repeats: int
    encoder: str
    settings: dict[str, Any]
    files: list[dict[str, Any]]
    sources: list[dict[str, Any]]


class Shards:
    """Prepared data, mapped into memory: one stream of tokens, and where its documents end."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        files: Sequence[np.ndarray],
        documents: np.ndarray,
        trained: Sequence[np.ndarray | None] = (),
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.num_tokens = manifest.num_tokens
        self._files = [file.view(np.ndarray) for file in files]  # slices of a memmap proper cost ten times more
        self._starts = [0, *itertools.accumulate(len(file) for file in files)]
        self._ends = documents.view(np.ndarray)[:, 0]
        has_masks = any(mask is not None for mask in trained)
        whole = [np.broadcast_to(True, len(file)) for file in files] if has_masks else []
        self._trained = [
            every if mask is None else mask.view(np.ndarray) for mask, every in zip(trained, whole, strict=False)
        ]

    @property
    def document_ends(self) -> np.ndarray:
        """The end of each document in the stream, as int64 [num_documents], still on disk."""
        return self._ends

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of the stream in their own dtype; a view where they lie in one file."""
        return self._slice(self._files, start, stop)

    def trained(self, start: int, stop: int) -> np.ndarray | None:
        """Return which of tokens [start, stop) are learned, as bool; None where all of the data is."""
        return self._slice(self._trained, start, stop) if self._trained else None

    def _slice(self, files: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        at = min(bisect.bisect_right(self._starts, start), len(files)) - 1
        parts = []
        while start < stop or not parts:
            base, end = self._starts[at], min(stop, self._starts[at + 1])
            parts.append(files[at][start - base : end - base])
            start, at = end, at + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a folder that `prepare` wrote, damaged or not: a manifest beside arrays."""
    path = Path(path)
    try:
        return (path / _MANIFEST).is_file() and any(path.glob("*.npy"))
    except (OSError, ValueError):
        return False


def cache_dir() -> Path:
    """Return where Ostro keeps what can be made again: `ostro` under XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ostro"


def open_shards(path: str | Path) -> Shards:
    """Map the token shards in `path`.

    Raises DataError where files are missing, cut off or contradict the manifest.
    """
    path = Path(path)
    manifest = read_manifest(path)
    _allow_files(3 * len(manifest.files))
    files = [_mapped(path / str(file["name"])) for file in manifest.files]
    for file, tokens in zip(manifest.files, files, strict=True):
        _agree(path, f"the shape of {file['name']}", [file["num_tokens"]], list(tokens.shape))
        _agree(path, f"the dtype of {file['name']}", manifest.dtype, str(tokens.dtype))
    _agree(path, "num_tokens", manifest.num_tokens, sum(len(tokens) for tokens in files))
    _agree(path, "num_trained", manifest.num_trained, sum(file["num_trained"] for file in manifest.files))
    trained = [_mask(path, file) for file in manifest.files]
    documents = _mapped(path / "documents.npy")
    _agree(path, "the shape of documents.npy", [manifest.num_documents, 2], list(documents.shape))
    _agree(path, "the dtype of documents.npy", "int64", str(documents.dtype))
    ends = documents[:, 0]
    _agree(path, "the end of the last document", manifest.num_tokens, int(ends[-1]))
    if ends[0] < 1 or not np.all(ends[1:] > ends[:-1]):
        raise DataError(f"{path}/documents.npy is damaged, its ends do not rise: prepare the data again.")
    return Shards(path, manifest, files, documents, trained)


def fingerprint(shards: Sequence[Shards]) -> str:
    """Name these tokens: by what they were made of, and by how many came out, which other templates change."""
    made = [
        [[source["sha256"] for source in one.sources], one.num_documents, one.num_tokens, one.num_trained]
        for one in (part.manifest for part in shards)
    ]
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder."""
    beside = path / f"{_MANIFEST}.{secrets.token_hex(4)}.writing"  # two shares may end at the same moment
    beside.write_text(_as_json(vars(manifest)), "utf-8")
    beside.replace(path / _MANIFEST)


def _as_json(fields: dict[str, Any]) -> str:
    """Return JSON with a line for each field and each element of a list, which is quick for a million sources."""

    def value(found: Any) -> str:
        if not isinstance(found, list):
            return json.dumps(found)
        return "[\n    " + ",\n    ".join(map(json.dumps, found)) + "\n  ]"

    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {value(found)}" for name, found in fields.items()) + "\n}\n"


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a folder; DataError where it is missing, damaged or of another format."""
    try:
        data = json.loads((path / _MANIFEST).read_bytes())
    except OSError:
        raise DataError(
            f"{path} is not prepared data, it has no readable {_MANIFEST}: run ostro prepare, or name another folder."
        ) from None
    except (ValueError, RecursionError):
        data = None
    fields = [field.name for field in dataclasses.fields(Manifest)]
    given = data.get("format") if isinstance(data, dict) else None
    if given is not None and given != FORMAT:
        raise DataError(f"{path} is in the format {given!r}, and this Ostro reads {FORMAT!r}: prepare it again.")
    if not isinstance(data, dict) or sorted(data) != sorted(fields) or not _is_typed(data):
        raise DataError(f"{path / _MANIFEST} is damaged or not Ostro's: prepare the data again.")
    return Manifest(**data)


def _is_typed(data: dict[str, Any]) -> bool:
    counts = [field.name for field in dataclasses.fields(Manifest) if field.name.startswith("num_")]
    counts += ["vocab_size", "bos_token_id", "eos_token_id"]
    files, sources = data["files"], data["sources"]
    return (
        all(type(data[name]) is int and data[name] >= 0 for name in counts)
        and data["num_documents"] > 0
        and isinstance(files, list)
        and len(files) > 0
        and all(isinstance(file, dict) and file.keys() >= _FILE for file in files)
        and isinstance(sources, list)
        and all(isinstance(data[name], str) for name in ("key", "tokenizer", "tokenizer_sha256", "dtype", "encoder"))
    )


def _mapped(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} is missing, though the manifest names it: prepare the data again.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, EOFError, SyntaxError):
        array = None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is cut off or no .npy file: prepare the data again.")
    return array


def _allow_files(count: int) -> None:
    """Let this process have so many more files open: a mapped one counts as such, and 1,024 are the usual limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + _FEW_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _mask(path: Path, file: dict[str, Any]) -> np.ndarray | None:
    if file["num_trained"] == file["num_tokens"]:
        return None
    name = str(file["name"]).replace("tokens", "trained")
    mask = _mapped(path / name)
    _agree(path, f"the shape of {name}", [file["num_tokens"]], list(mask.shape))
    _agree(path, f"the dtype of {name}", "bool", str(mask.dtype))
    return mask


def _agree(path: Path, what: str, said: Any, found: Any) -> None:
    if said != found:
        raise DataError(
            f"{path}: the manifest says {said} for {what}, and the files have {found}: prepare the data again."
        )
