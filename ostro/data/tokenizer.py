"""Text to token ids and back, with Mixtral's own vocabulary or another one of its kind.

Whatever the source, the vocabulary is held as a `tokenizer.json`. Text stays text: "<s>" in a document is
three characters, never the id of BOS.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ostro.data.piece_model import read_piece_model
from ostro.errors import DataError, nearest

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer as Bpe

    from ostro.data.fast import FastEncoder

# The vocabularies of Mistral that the package mistral-common ships: 8x7B uses v1, 8x22B uses v3.
_SHIPPED = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
_PROVE_EVERY, _PROVE_TEXTS, _PROVE_CHARS = 1 << 22, 6, 1024  # characters between proofs, texts, and of each
_ROLES = ("bos", "eos", "unk", "pad")
_USUAL = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": None}
_KEPT = ("add_bos_token", "add_eos_token", "chat_template", "model_max_length", "padding_side")
_SEGMENT_CHARS, _GROUP_CHARS = 1 << 13, 1 << 20
_TO_BARS = (
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
)
_WORDS = "▁*[^▁\n]+|▁+|\n+"


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """Replace every undecodable byte by a U+FFFD, as sentencepiece does (Python: one for each sequence)."""
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error("ostro.each_byte", _each_byte)


class Tokenizer:
    """A vocabulary with its rules; made by `load_tokenizer`.

    `vocab_size` counts every id, added tokens included; `unk_token_id` and `pad_token_id` are None where
    there is none; `sha256` names the vocabulary: equal pieces in equal order give the same one from any
    kind of file.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        roles: Mapping[str, str | None],
        *,
        name: str,
        config: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> None:
        self.name = name
        self._bpe = _build(files["tokenizer.json"], name)
        cuts = _may_split_at_words(spec)
        if cuts:
            _split_at_words(self._bpe)
        ids = self._bpe.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if self.vocab_size > 2 * len(ids):
            raise DataError(
                f"tokenizer {name} has {len(ids)} pieces with ids up to {self.vocab_size - 1}: its file "
                "is damaged, fetch it again."
            )
        pieces: list[str | None] = [None] * self.vocab_size
        for piece, at in ids.items():
            pieces[at] = piece
        self.sha256 = hashlib.sha256(json.dumps(pieces).encode()).hexdigest()
        for role in ("bos", "eos"):
            if roles[role] not in ids:
                raise DataError(
                    f"tokenizer {name} has no {role.upper()} token (looked for {roles[role]!r}): name it as "
                    f"{role}_token in the tokenizer_config.json beside the tokenizer.json."
                )
        self.bos_token_id: int = ids[str(roles["bos"])]
        self.eos_token_id: int = ids[str(roles["eos"])]
        self.unk_token_id: int | None = ids.get(str(roles["unk"]))
        self.pad_token_id: int | None = ids.get(str(roles["pad"])) if roles["pad"] else None
        self._roles, self._config, self._files = dict(roles), dict(config), dict(files)
        specials = {token["content"] for token in spec.get("added_tokens") or () if token.get("special")}
        self._bytes, self._errors, self._strip = _byte_table(spec, pieces, specials, name)
        # A long text is cut before newlines; what a cut adds in front (the prefix space) is dropped again.
        self._num_prefix = len(self._encode_group(["\n"])[0]) - 1 if cuts else None
        self._encoder: FastEncoder | None = None
        self._unproved = _PROVE_EVERY

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of one text, with BOS before and EOS after it where asked for."""
        ids = self.encode_batch([text])[0]
        return [self.bos_token_id] * bos + ids + [self.eos_token_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without BOS and EOS, on all cores.

        Raises DataError for a text with half a surrogate pair, which is no text.
        """
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    @property
    def spec(self) -> bytes:
        """The vocabulary as a tokenizer.json."""
        return self._files["tokenizer.json"]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return what `encode_batch` does as uint32 arrays, which take a tenth of the memory.

        Now and then the fast encoder is held against the slow one over the beginnings of some of the texts; once
        they differ, this tokenizer is not `is_fast` any more.
        """
        if self._encoder is None:
            return self.encode_slowly(texts)
        try:
            self._prove(texts)
            return [self._encoder.encode(text) for text in texts] if self._encoder else self.encode_slowly(texts)
        except (TypeError, UnicodeEncodeError):  # what gigatoken says of a string that has no UTF-8
            raise _half_a_pair() from None

    def _prove(self, texts: Sequence[str]) -> None:
        self._unproved += sum(map(len, texts))
        if self._unproved >= _PROVE_EVERY:
            self._unproved = 0
            if not self.agrees([text[:_PROVE_CHARS] for text in texts[:: len(texts) // _PROVE_TEXTS + 1]]):
                self._encoder = None

    @property
    def is_fast(self) -> bool:
        """Whether `hurry` found an encoder."""
        return self._encoder is not None

    def hurry(self) -> bool:
        """From now on encode with gigatoken, if it is installed and gives this vocabulary's ids; say whether."""
        from ostro.data.fast import fast_encoder

        self._encoder = fast_encoder(self)
        return self.is_fast

    def slow(self) -> Tokenizer:
        """Return the same tokenizer without the fast encoder."""
        other = copy.copy(self)
        other._encoder = None
        return other

    def unproved(self) -> Tokenizer:
        """Return the same tokenizer, whose fast encoder is held against the slow one at the next texts."""
        other = copy.copy(self)
        other._unproved = _PROVE_EVERY
        return other

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of all that `save` writes: vocabulary, rules, special tokens and chat template."""
        written = sorted(self._written().items())
        return hashlib.sha256(b"".join(f"{name} {len(data)} ".encode() + data for name, data in written)).hexdigest()

    def agrees(self, texts: Sequence[str]) -> bool:
        """Whether the fast encoder gives the ids that count for these texts."""
        from ostro.data.fast import agrees

        return self._encoder is None or agrees(self._encoder, self, texts)

    def encode_slowly(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids by the package tokenizers alone, which is what counts where anything faster differs."""
        import numpy as np

        pieces: list[list[np.ndarray]] = [[] for _ in texts]
        segments = ((at, part) for at, text in enumerate(texts) for part in self._segments(text))
        for group in _groups(segments):
            for (at, _), ids in zip(group, self._encode_group([part for _, part in group]), strict=True):
                pieces[at].append(ids[self._num_prefix :] if pieces[at] else ids)
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`: specials skipped, the leading space of the first word dropped.

        Bytes that are no UTF-8 become U+FFFD, one each, as in sentencepiece; ids without a piece are skipped.
        """
        table = self._bytes
        text = b"".join(table[at] for at in ids if 0 <= at < len(table)).decode("utf-8", self._errors)
        return text[1:] if self._strip and text.startswith(" ") else text

    def stream(self) -> Stream:
        """Return a decoder that takes ids one by one and gives text as soon as it is whole."""
        return Stream(self._bytes, self._errors, self._strip)

    def save(self, folder: str | Path) -> None:
        """Write the files that Hugging Face's `AutoTokenizer` and every other reader needs into `folder`.

        `PreTrainedTokenizerFast` is the class that takes tokenizer.json as it stands, in transformers 4 and 5
        alike; `LlamaTokenizer` would rebuild it by rules of its own.
        """
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for name, data in self._written().items():
                (Path(folder) / name).write_bytes(data)
        except OSError as error:
            raise DataError(f"the tokenizer cannot be written to {folder}: {error.strerror}.") from None

    def _written(self) -> dict[str, bytes]:
        tokens = {f"{role}_token": self._roles[role] for role in _ROLES if self._roles[role] is not None}
        config = {
            **self._config,
            **tokens,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        return {
            **self._files,
            "tokenizer_config.json": _json_bytes(config),
            "special_tokens_map.json": _json_bytes(tokens),
        }

    def _segments(self, text: str) -> Iterator[str]:
        """Cut a long text before newlines, so that one document uses every core and bounded memory."""
        start = 0
        while self._num_prefix is not None and len(text) - start > 2 * _SEGMENT_CHARS:
            cut = text.find("\n", start + _SEGMENT_CHARS)
            if cut < 0:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _encode_group(self, texts: list[str]) -> list[np.ndarray]:
        import numpy as np

        try:
            encodings = self._bpe.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # what tokenizers says of a string that has no UTF-8
            raise _half_a_pair() from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


class Stream:
    """Decodes one sequence id by id; the pushes and the flush together are what `Tokenizer.decode` gives."""

    def __init__(self, table: Sequence[bytes], errors: str, strip: bool) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._strip = strip

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; empty for specials and inside a character."""
        known = 0 <= token_id < len(self._table)
        return self._emit(self._decoder.decode(self._table[token_id] if known else b""))

    def flush(self) -> str:
        """Return what is left: U+FFFD for the bytes of a character that never became whole."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _half_a_pair() -> DataError:
    return DataError("a text holds half of a surrogate pair, which no UTF-8 can express: remove the character.")


def _groups(segments: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Gather segments up to _GROUP_CHARS: work for every core, at some 200 bytes of memory a token."""
    group: list[tuple[int, str]] = []
    num_chars = 0
    for segment in segments:
        group.append(segment)
        num_chars += len(segment[1])
        if num_chars >= _GROUP_CHARS:
            yield group
            group, num_chars = [], 0
    if group:
        yield group


def load_tokenizer(source: str | Path = "v1") -> Tokenizer:
    """Load "v1" or "v3" (shipped with mistral-common), a `.model`, a `tokenizer.json` or an HF folder.

    Raises DataError where there is none, or none that Ostro can repeat exactly.
    """
    if str(source) in _SHIPPED:
        return _from_piece_model(_shipped(str(source)), str(source))
    path = Path(source)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _from_json(path / "tokenizer.json", path.resolve().name)
        if (path / "tokenizer.model").is_file():
            return _from_piece_model(path / "tokenizer.model", path.resolve().name)
        raise DataError(f"{path} holds neither tokenizer.json nor tokenizer.model: name a folder that has one.")
    if not path.is_file():
        raise DataError(
            f"tokenizer {str(source)!r} is neither v1 nor v3 nor a file or folder that exists."
            f"{nearest(str(source), _SHIPPED)}"
        )
    if path.suffix == ".json":
        return _from_json(path, path.stem)
    return _from_piece_model(path, path.stem)


def _shipped(version: str) -> Path:
    from importlib import resources

    try:
        path = Path(str(resources.files("mistral_common") / "data" / _SHIPPED[version]))
    except ModuleNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise DataError(
            f"tokenizer {version} comes with the package mistral-common, which is not installed or lacks "
            f"{_SHIPPED[version]}: install it, or name a tokenizer.model or tokenizer.json."
        )
    return path


def _from_piece_model(path: Path, name: str) -> Tokenizer:
    spec, roles = read_piece_model(path)
    files = {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode(), "tokenizer.model": _read(path)}
    config = {"add_bos_token": True, "add_eos_token": False}
    return Tokenizer(spec, roles, name=name, config=config, files=files)


def _from_json(path: Path, name: str) -> Tokenizer:
    """Load a tokenizer.json; the files beside it say which tokens are BOS, EOS, unknown and padding."""
    spec = _read_object(path)
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise DataError(f"{path} does not describe a BPE vocabulary: name the tokenizer.json of a Mixtral.")
    beside = [_read_object(other) for other in _beside(path)]
    roles: dict[str, str | None] = dict(_USUAL)
    for role in _ROLES:
        for given in beside:
            token = given.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                roles[role] = token
    config = {key: given[key] for given in beside for key in _KEPT if key in given}
    files = {"tokenizer.json": _read(path)}
    for other in ("tokenizer.model", "chat_template.jinja"):
        if (path.parent / other).is_file():
            files[other] = _read(path.parent / other)
    return Tokenizer(spec, roles, name=name, config=config, files=files)


def _beside(path: Path) -> list[Path]:
    """Return the files that explain `path`, the more telling one last."""
    names = ("special_tokens_map.json", "tokenizer_config.json")
    return [path.parent / name for name in names if (path.parent / name).is_file()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object (truncated, or another file): fetch it again.")
    return value


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def _build(file: bytes, name: str) -> Bpe:
    from tokenizers import Tokenizer as Bpe

    try:
        bpe = Bpe.from_buffer(file)
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(f"the tokenizer.json of {name} is not one that can be used: {error}.") from None
    bpe.encode_special_tokens = True  # text stays text
    bpe.no_padding()
    bpe.no_truncation()
    return bpe


def _may_split_at_words(spec: Mapping[str, Any]) -> bool:
    """Whether no merge crosses the start of a word or a newline, so that splitting there changes no id.

    Without the split a long document takes more than linear time. True of every Mistral vocabulary: no
    piece has a space after something else, or a newline, and all that happens to a text before is that
    spaces become "▁".
    """
    model = spec["model"]
    normalizer, pre = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    added = [token.get("content", "") for token in spec.get("added_tokens") or ()]
    return (
        bool(model.get("byte_fallback"))
        and all(step in _TO_BARS for step in steps)
        and (not pre or (pre.get("type") == "Metaspace" and pre.get("split") is False))
        and "<0x0A>" in model["vocab"]
        and not any(map(re.compile("[^▁]▁|\n").search, [*model["vocab"], *added]))
    )


def _split_at_words(bpe: Bpe) -> None:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    before = bpe.pre_tokenizer
    bpe.pre_tokenizer = split if before is None else pre_tokenizers.Sequence([before, split])


def _byte_table(
    spec: Mapping[str, Any], pieces: Sequence[str | None], specials: set[str], name: str
) -> tuple[list[bytes], str, bool]:
    """Return the bytes of every id, how to treat broken UTF-8, and whether one leading space goes."""
    decoder = spec.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    replaced = [(step["pattern"], step["content"]) for step in steps if step.get("type") == "Replace"]
    strips = [(step["content"], step["start"], step["stop"]) for step in steps if step.get("type") == "Strip"]

    def from_byte_level(piece: str) -> bytes:
        if all(letter in letters for letter in piece):
            return bytes(letters[letter] for letter in piece)
        return piece.encode()

    def from_byte_fallback(piece: str) -> bytes:
        if piece.startswith("<0x") and re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        for old, new in replaced:
            piece = piece.replace(old["String"], new)
        return piece.encode()

    if kinds == {"ByteLevel"}:
        to_bytes, errors = from_byte_level, "replace"
    elif (
        "ByteFallback" in kinds
        and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}
        and all(old.get("String") for old, _ in replaced)
        and strips in ([], [(" ", 1, 0)])
    ):
        to_bytes, errors = from_byte_fallback, "ostro.each_byte"
    else:
        found = ", ".join(sorted(map(str, kinds)))
        raise DataError(
            f"tokenizer {name} decodes by {found}, and Ostro knows byte fallback (Mistral, Llama) and "
            "byte level (GPT, Llama 3): use a tokenizer of one of these kinds."
        )
    table = [b"" if piece is None or piece in specials else to_bytes(piece) for piece in pieces]
    return table, errors, bool(strips)


def _byte_letters() -> dict[int, str]:
    """Return the letter GPT-2 writes for each byte: printable ones stand for themselves (its encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(others)}
