"""The vocabulary in a GGUF file: sentencepiece's pieces, scores and types, which llama.cpp's tokenizer reads."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ostro.errors import DataError
from ostro.model.settings import ModelConfig
from ostro.weights.gguf_file import package
from ostro.weights.hf_config import SaveTokenizer, read_json, save_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_MODEL = "tokenizer.model"
_UNUSED_SCORE = -10000.0  # what convert_hf_to_gguf.py gives a row of the embedding that no piece stands for


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Pieces in the order of their ids with sentencepiece's scores and gguf's types, and the special ids."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    ids: dict[str, int]  # by role
    has_space_prefix: bool
    chat_template: str


def vocabulary_of(tokenizer: SaveTokenizer, model: ModelConfig) -> tuple[Vocabulary | None, list[str]]:
    """Return the vocabulary to write, or None and a sentence that says why there is none."""
    if tokenizer is None:
        return None, ["there is no tokenizer in it: llama.cpp takes and gives token ids alone"]
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        file = Path(folder) / _MODEL
        if not file.is_file():
            return None, ["there is no tokenizer in it: the one given has no tokenizer.model, which GGUF is made from"]
        try:
            found = _read(Path(folder))
        except DataError as error:
            reason = str(error).replace(str(file), _MODEL).rstrip(".")
            return None, [f"there is no tokenizer in it: {reason}"]
    if len(found.pieces) > model.vocab_size:
        return None, [
            f"there is no tokenizer in it: the one given has {len(found.pieces)} pieces, the model {model.vocab_size}"
        ]
    return found, []


def _read(folder: Path) -> Vocabulary:
    """Return the vocabulary of a sentencepiece model; DataError for one that is not of Mixtral's kind."""
    file = folder / _MODEL
    from sentencepiece import SentencePieceProcessor

    from ostro.data.piece_model import read_piece_model

    spec, roles = read_piece_model(file)
    types = package().TokenType
    processor = SentencePieceProcessor(model_file=str(file))
    ids: dict[str, int] = spec["model"]["vocab"]
    pieces = list(ids)  # in the order of the ids
    specials = {token["content"] for token in spec["added_tokens"]}

    def type_of(at: int, piece: str) -> int:
        if piece == roles["unk"]:
            return types.UNKNOWN
        if processor.IsByte(at):
            return types.BYTE
        return types.CONTROL if piece in specials else types.NORMAL

    return Vocabulary(
        pieces=pieces,
        scores=[processor.GetScore(at) for at in range(len(pieces))],
        types=[int(type_of(at, piece)) for at, piece in enumerate(pieces)],
        ids={role: ids[piece] for role, piece in roles.items() if piece is not None},
        has_space_prefix=any(step["type"] == "Prepend" for step in spec["normalizer"]["normalizers"]),
        chat_template=_chat_template(folder),
    )


def _chat_template(folder: Path) -> str:
    """Return the template a chat is written with, from a file of its own or the tokenizer's settings; "" for none."""
    own, beside = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.is_file():
        return own.read_text("utf-8", errors="replace")
    found = read_json(beside).get("chat_template", "") if beside.is_file() else ""
    if isinstance(found, list):  # several, by name
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), "")
    return found if isinstance(found, str) else ""


def add_vocabulary(writer: GGUFWriter, model: ModelConfig, found: Vocabulary | None) -> None:
    """Add pieces and special ids; without a vocabulary the ids of the model's own configuration."""
    ids = {"bos": model.bos_token_id, "eos": model.eos_token_id}
    if model.pad_token_id is not None:
        ids["pad"] = model.pad_token_id
    if found is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        ids |= found.ids
        spare = range(len(found.pieces), model.vocab_size)
        unused = int(package().TokenType.UNUSED)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([*found.pieces, *(f"[PAD{at}]" for at in spare)])
        writer.add_token_scores([*found.scores, *(_UNUSED_SCORE for _ in spare)])
        writer.add_token_types([*found.types, *(unused for _ in spare)])
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(found.has_space_prefix)
        if found.chat_template:
            writer.add_chat_template(found.chat_template)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, at in ids.items():
        add[role](at)
