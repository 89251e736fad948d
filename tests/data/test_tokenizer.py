"""Our ids against sentencepiece's, our files against transformers', text in pieces against text at once."""

from __future__ import annotations

import functools
import json
import random
import sysconfig
from importlib import resources
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ostro.data import tokenizer as room
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import DataError

SHIPPED = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
SPECIALS = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<0x0A>", "<pad>"]

load = functools.cache(load_tokenizer)


def model_file(version: str) -> Path:
    return Path(str(resources.files("mistral_common") / "data" / SHIPPED[version]))


@functools.cache
def reference(version: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file(version)))


strings = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.integers(1, 40).map(lambda count: " " * count),
        st.sampled_from([*SPECIALS, "▁", "▁▁", "\n", "\n\n", "\t", "\r\n", "\x00", "\u200b", "\ufeff"]),
        st.sampled_from(
            ["the", " return self", "字典", "こんにちは", "😀", "👩‍👩‍👧", "é", "e\u0301", "123", "…", "def"]
        ),
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("version", SHIPPED)
@settings(max_examples=150)
@given(text=strings)
@example(text="")
@example(text=" ")
@example(text="".join(SPECIALS))
def test_ids_are_sentencepieces(version: str, text: str):
    ids = load(version).encode(text)
    assert ids == reference(version).encode(text)
    assert load(version).decode(ids) == reference(version).decode(ids)
    if not text.startswith("▁"):
        assert load(version).decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("version", SHIPPED)
def test_runs_of_spaces(version: str):
    texts = [before + " " * count + after for count in range(1, 120) for before in "a\n" for after in ("", "for", "\n")]
    assert load(version).encode_batch(texts) == reference(version).encode(texts)


@pytest.mark.parametrize("version", SHIPPED)
def test_ids_on_the_sample_data(version: str, shared: Path):
    texts = [path.read_text("utf-8") for path in sorted((shared / "data").iterdir())]
    assert sum(map(len, texts)) > 4_000_000
    assert load(version).encode_batch(texts) == reference(version).encode(texts)


def test_ids_on_source_code():
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::4]
    texts = [path.read_text("utf-8") for path in files]
    assert len(texts) > 30
    assert load("v1").encode_batch(texts) == reference("v1").encode(texts)


def test_a_long_text_is_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch):
    draw = random.Random(0)
    parts = ["word", " word", "\n", "\n\n", " ", "   ", "▁", "字", "😀", "x" * 30, "<s>"]
    text = "".join(draw.choice(parts) for _ in range(3000))
    whole = load("v1").encode(text)
    assert whole == reference("v1").encode(text)
    monkeypatch.setattr(room, "_GROUP_CHARS", 300)
    for size in (1, 7, 100):
        monkeypatch.setattr(room, "_SEGMENT_CHARS", size)
        assert len(list(load("v1")._segments(text))) > 10
        assert load("v1").encode_batch(["", text, "a", text]) == [[], whole, load("v1").encode("a"), whole]


def test_long_words_and_long_lines():
    text = "x" * 20_000 + " word" * 40_000
    assert load("v1").encode(text) == reference("v1").encode(text)


@pytest.mark.parametrize("version", SHIPPED)
def test_special_ids(version: str):
    ours, theirs = load(version), reference(version)
    assert ours.vocab_size == theirs.vocab_size()
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
    assert ours.pad_token_id is None
    assert ours.encode("a", bos=True, eos=True) == [1, *theirs.encode("a"), 2]
    assert ours.encode("", bos=True) == [1]
    specials = {at for at in range(ours.vocab_size) if theirs.is_control(at) or theirs.is_unknown(at)}
    assert specials >= {0, 1, 2}
    assert ours.decode(sorted(specials)) == ""
    marks = [theirs.id_to_piece(at) for at in specials]
    assert not specials & {token for ids in ours.encode_batch(marks) for token in ids}
    assert ours.name == version


def test_reserved_marks_of_v3_stay_text():
    """sentencepiece makes ids of these twenty user-defined pieces; a document must not be able to."""
    mark = "[REFERENCE_DOC_1]"
    assert reference("v3").encode(mark)[-1] == reference("v3").piece_to_id(mark)
    assert reference("v3").piece_to_id(mark) not in load("v3").encode(mark)
    assert load("v3").decode(load("v3").encode(mark)) == mark


ids_v1 = st.lists(st.one_of(st.integers(3, 258), st.integers(0, 31_999)), max_size=30)


@settings(max_examples=300)
@given(ids_v1)
@example([3 + byte for byte in "\n😀é".encode()])
@example([3 + 0xF0, 3 + 0x9F, 28705, 3 + 0xE2, 3 + 0x82])
@example([1, 28705, 28705, 2])
def test_streaming_is_decoding(ids: list[int]):
    stream = load("v1").stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == load("v1").decode(ids)


@settings(max_examples=300)
@given(st.lists(st.one_of(st.integers(3, 258), st.integers(259, 31_999)), max_size=20))
def test_broken_utf8_decodes_as_sentencepiece_does(ids: list[int]):
    # No text has an encoding that begins with the byte piece of a space; transformers drops it, as we do.
    assume(ids[:1] != [3 + ord(" ")])
    assert load("v1").decode(ids) == reference("v1").decode(ids)


def test_streaming_holds_back_no_more_than_a_character():
    tokenizer = load("v1")
    ids = tokenizer.encode("Hi 🫠🫠\n", bos=True)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["Hi", " ", "🫠", "🫠", "\n"]
    assert pieces[-1] == "\n"
    assert stream.flush() == ""
    stream.push(3 + 0xF0)
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_ids_without_a_piece_are_skipped():
    assert load("v1").decode([22557, 32_000, -1, 99_999]) == "Hello"
    assert load("v1").stream().push(32_000) == ""


@pytest.fixture(scope="module", params=SHIPPED)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("saved") / "model"
    load(request.param).save(folder)
    return request.param, folder


def sample(shared: Path) -> list[str]:
    lines = (shared / "data" / "wikitext2_valid.txt").read_text("utf-8").split("\n")[:800]
    return [*lines, (shared / "data" / "botchan.txt").read_text("utf-8")[:20_000], "  two", "字 😀\n", ""]


@pytest.mark.parametrize("with_config", [False, True])
def test_transformers_reads_what_we_save(saved: tuple[str, Path], shared: Path, with_config: bool):
    transformers = pytest.importorskip("transformers")
    version, folder = saved
    if with_config:
        (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}), "utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load(version)
    texts = [text.replace("<unk>", "") for text in sample(shared)]
    ids = [[1, *row] for row in ours.encode_batch(texts)]
    assert theirs(texts)["input_ids"] == ids
    assert theirs(texts, add_special_tokens=False)["input_ids"] == [row[1:] for row in ids]
    for row in ids[-100:]:
        assert theirs.decode(row, skip_special_tokens=True) == ours.decode(row)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.pad_token_id is None
    assert theirs("a", "b")["input_ids"] == [1, *ours.encode("a"), 1, *ours.encode("b")]


def test_what_we_save_loads_as_the_same(saved: tuple[str, Path], shared: Path):
    version, folder = saved
    assert (folder / "tokenizer.model").read_bytes() == model_file(version).read_bytes()
    ours, texts = load(version), [*sample(shared), "".join(SPECIALS)]
    for source in (folder, folder / "tokenizer.json", folder / "tokenizer.model", str(folder)):
        again = load_tokenizer(source)
        assert again.sha256 == ours.sha256
        assert again.encode_batch(texts) == ours.encode_batch(texts)
        assert (again.bos_token_id, again.eos_token_id, again.unk_token_id) == (1, 2, 0)
        assert again.decode(again.encode(texts[0], bos=True)) == texts[0]


def test_saving_twice_changes_nothing(saved: tuple[str, Path], tmp_path: Path):
    folder = saved[1]
    load_tokenizer(folder).save(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_vocabularies_have_their_own_names():
    assert load("v1").sha256 != load("v3").sha256


def test_what_transformers_saves(tmp_path: Path, shared: Path):
    transformers = pytest.importorskip("transformers")
    load("v1").save(tmp_path / "a")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    theirs.chat_template = "{{ messages }}"
    theirs.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<|im_start|>"]})
    theirs.save_pretrained(tmp_path / "b")
    ours = load_tokenizer(tmp_path / "b")
    assert (ours.vocab_size, ours.pad_token_id) == (32002, 32000)
    assert ours.sha256 != load("v1").sha256
    text = "a <|im_start|> b <pad>"
    assert max(ours.encode(text)) < 32000
    assert ours.decode([*ours.encode(text), 32000, 32001]) == text
    texts = [line for line in sample(shared) if "<unk>" not in line]
    assert [[1, *ids] for ids in ours.encode_batch(texts)] == theirs(texts)["input_ids"]
    ours.save(tmp_path / "c")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "c")
    assert (again.chat_template, again.pad_token_id) == ("{{ messages }}", 32000)


def byte_level(folder: Path) -> None:
    """Train a small vocabulary of GPT-2's kind, which Ostro can read as well."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the wind rose and the rose wound", "Grüße 😀"] * 5, trainer)
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))


def test_a_byte_level_vocabulary(tmp_path: Path):
    byte_level(tmp_path / "gpt")
    with pytest.raises(DataError, match=r"gpt has no BOS token \(looked for '<s>'\): name it as bos_token"):
        load_tokenizer(tmp_path / "gpt")
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"}
    (tmp_path / "gpt" / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    ours = load_tokenizer(tmp_path / "gpt")
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, None)
    text = " the rose, Grüße 😀\n<|end|>"
    ids = ours.encode(text, bos=True, eos=True)
    assert ids.count(1) == 1
    assert ours.decode(ids) == text
    stream = ours.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert ours.decode(ours.encode("😀")[:-1]) == ours._bpe.decode(ours.encode("😀")[:-1])


def break_json(change: dict[str, object]) -> bytes:
    spec = json.loads(load("v1")._files["tokenizer.json"])
    return json.dumps(spec | change).encode()


def test_nothing_is_split_where_a_normalizer_may_join(tmp_path: Path):
    """A vocabulary whose normalizer turns newlines into spaces has merges across what were lines."""
    blank = {"type": "Replace", "pattern": {"Regex": "\\s"}, "content": "▁"}
    (tmp_path / "tokenizer.json").write_bytes(break_json({"normalizer": blank}))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    text = "a\n\n\n  b" * 4000
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.encode(text) == plain.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode("a\nb")) == "a b"


BAD_FILES = {
    "half a model": (
        "a.model",
        lambda: model_file("v1").read_bytes()[:100_001],
        "is not a sentencepiece model",
    ),
    "text as model": ("a.model", lambda: b"The wind rose.", "is not a sentencepiece model"),
    "an empty model": ("a.model", lambda: b"", "is not a sentencepiece model"),
    "half a JSON": ("tokenizer.json", lambda: break_json({})[:50_000], "is not a JSON object"),
    "a list": ("tokenizer.json", lambda: b"[1]", "is not a JSON object"),
    "bad UTF-8": ("tokenizer.json", lambda: b'{"a": "\xff"}', "is not a JSON object"),
    "another JSON": ("tokenizer.json", lambda: b'{"a": 1}', "does not describe a BPE vocabulary"),
    "no merges": (
        "tokenizer.json",
        lambda: b'{"model": {"type": "BPE", "vocab": {"a": "b"}}}',
        "is not one that can be used",
    ),
    "another decoder": (
        "tokenizer.json",
        lambda: break_json({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}),
        "decodes by WordPiece, and Ostro knows byte fallback",
    ),
    "ids far apart": (
        "tokenizer.json",
        lambda: b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 4000000000}, "merges": []}}',
        "has 2 pieces with ids up to 4000000000",
    ),
    "no decoder": ("tokenizer.json", lambda: break_json({"decoder": None}), "decodes by None"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files(tmp_path: Path, what: str):
    name, content, message = BAD_FILES[what]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path / name)


def trained(folder: Path, **settings_: object) -> Path:
    """Train a small sentencepiece model of the kind that `settings_` says."""
    (folder / "text.txt").write_text("the wind rose and the rose wound round the round rose\n" * 20, "utf-8")
    usual = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False}
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "small"), **(usual | rules | settings_)
    )
    return folder / "small.model"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"model_type": "unigram"}, "it is not a BPE model"),
        ({"byte_fallback": False, "vocab_size": 40}, "it has 0 of the 256 byte pieces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it rewrites characters or spaces"),
        ({"remove_extra_whitespaces": True}, "it rewrites characters or spaces"),
        ({"treat_whitespace_as_suffix": True}, "it puts spaces at the ends of words"),
        ({"user_defined_symbols": ["\n"]}, r"it has the user-defined piece '\\n'"),
        ({"bos_id": -1}, "lacks a BOS"),
    ],
)
def test_models_of_other_rules_are_refused(tmp_path: Path, rules: dict[str, object], message: str):
    with pytest.raises(DataError, match=message):
        load_tokenizer(trained(tmp_path, **rules))


@pytest.mark.parametrize("rules", [{}, {"add_dummy_prefix": False}, {"split_by_whitespace": False}, {"pad_id": 3}])
def test_other_models_of_the_same_kind(tmp_path: Path, rules: dict[str, object]):
    path = trained(tmp_path, **rules)
    ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    # Pieces like "the▁wind" cross words: then nothing may be split there.
    assert (ours._num_prefix is None) == ("split_by_whitespace" in rules)
    assert ours.pad_token_id == (3 if "pad_id" in rules else None)
    texts = [
        "the wind rose",
        " the  round\nrose\n",
        "windé",
        "\nrose 😀",
        "",
        "the rose " * 3000 + "\n" + "wind " * 9000,
    ]
    assert ours.encode_batch(texts) == theirs.encode(texts)
    assert [ours.decode(ids) for ids in ours.encode_batch(texts)] == texts


def test_names_that_lead_nowhere(tmp_path: Path):
    with pytest.raises(DataError, match=r"tokenizer 'v2' is neither v1 nor v3 nor a file.* Did you mean 'v"):
        load_tokenizer("v2")
    with pytest.raises(DataError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_text_that_is_none():
    with pytest.raises(DataError, match="half of a surrogate pair"):
        load("v1").encode("a\ud800")


def test_saving_where_one_cannot(tmp_path: Path):
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(DataError, match=r"cannot be written to .*file: File exists"):
        load("v1").save(tmp_path / "file")


def test_a_name_and_its_file_are_the_same_vocabulary():
    assert load_tokenizer(model_file("v1")).sha256 == load("v1").sha256
