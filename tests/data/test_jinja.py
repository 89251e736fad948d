"""A tokenizer's own chat template: equal to transformers, learned where it is certain, refused where it is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.data import chat
from ostro.data.jinja import JinjaTemplate
from ostro.data.records import Chat, Message
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import DataError

SPECIALS = ("<s>", "</s>", "[INST]", "[/INST]", "<unk>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "▁", "<0x0A>")


@pytest.fixture(scope="module")
def v1() -> Tokenizer:
    return load_tokenizer("v1")


@pytest.fixture(scope="module")
def v3() -> Tokenizer:
    return load_tokenizer("v3")


def talk(*turns: tuple[str, str] | Message, tools: Sequence[Any] = ()) -> Chat:
    said = [turn if isinstance(turn, Message) else Message(turn[0], turn[1]) for turn in turns]  # type: ignore[arg-type]
    return Chat(said, "chat.jsonl line 7", tools)


def assert_sentence(error: DataError, part: str) -> None:
    text = str(error)
    assert part in text
    assert text.endswith((".", "?"))
    assert "\n" not in text


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
content = st.lists(st.one_of(st.sampled_from([*SPECIALS, " ", "\n"]), texts), max_size=6).map("".join)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}"
)


TAGGED = (
    "{{ bos_token }}{%- for m in messages %}{% if m.role == 'assistant' %}{{ ' ' }}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ '[' + m.role + '] ' + m.content }}\n{% endif %}"
    "{% endfor %}"
)


def transformers_tokenizer(tokenizer: Tokenizer, folder: Path, source: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(folder)
    given = PreTrainedTokenizerFast.from_pretrained(folder)
    given.chat_template = source
    return given


def with_tokens(tokenizer: Tokenizer, folder: Path, extra: Sequence[str], scheme: str | None = None) -> Tokenizer:
    """The same vocabulary with `extra` control tokens; with `scheme`, spaces put in front by Metaspace."""
    tokenizer.save(folder)
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for at, name in enumerate(extra, start=len(spec["model"]["vocab"])):
        spec["added_tokens"].append({"id": at, "content": name, **flags})
    if scheme:
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    path.write_text(json.dumps(spec), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=["legacy", "first"])
def chatml_tokenizer(request, v1, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chatml")
    scheme = "first" if request.param == "first" else None
    return with_tokens(v1, folder, ["<|im_start|>", "<|im_end|>"], scheme)


PLAIN = (
    talk(("user", "Hi"), ("assistant", "Hello there")),
    talk(("user", " two  spaces "), ("assistant", "a\n\nb"), ("user", "\ttab"), ("assistant", "ünïcödé 😀 ▁")),
    talk(("user", "q"), ("assistant", "x"), ("user", "1 < 2"), ("assistant", "42")),
)


@pytest.mark.parametrize("source", [CHATML, MIXTRAL, TAGGED], ids=["chatml", "mixtral", "tagged"])
def test_jinja_equals_transformers(source, chatml_tokenizer, tmp_path):
    theirs = transformers_tokenizer(chatml_tokenizer, tmp_path, source)
    for one in PLAIN:
        turns = [{"role": message.role, "content": message.content} for message in one.messages]
        ours = chat.render(one, JinjaTemplate(source), chatml_tokenizer)
        assert ours.ids.tolist() == theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
        expected = theirs.apply_chat_template(turns, tokenize=False)
        assert "".join(text for text, _ in ours.pieces) == expected
        if source is TAGGED:
            made = theirs.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            assert ours.trained.astype(int).tolist() == made["assistant_masks"]


def test_jinja_learns_the_answer_and_what_ends_it(chatml_tokenizer):
    one = talk(("user", "a"), ("assistant", "b c"), ("user", "d"), Message("assistant", "e", trained=False))
    ours = chat.render(talk(*one.messages, ("user", "f"), ("assistant", "g")), JinjaTemplate(CHATML), chatml_tokenizer)
    assert [text for text, learned in ours.pieces if learned] == ["b c", "<|im_end|>", "g", "<|im_end|>"]
    ours = chat.render(one, JinjaTemplate(MIXTRAL), chatml_tokenizer)
    assert [text for text, learned in ours.pieces if learned] == [" b c", "</s>"]
    ours = chat.render(one, JinjaTemplate(TAGGED), chatml_tokenizer)
    assert [text for text, learned in ours.pieces if learned] == ["b c", "</s>"]


@settings(max_examples=60)
@given(st.lists(st.tuples(content, content.filter(lambda text: bool(text.strip()))), min_size=1, max_size=3))
def test_jinja_keeps_text_text(v3, turns):
    tokenizer = v3
    one = talk(*(each for asked, said in turns for each in (("user", asked), ("assistant", said))))
    template = JinjaTemplate(MIXTRAL)
    ours = chat.render(one, template, tokenizer)
    ids = ours.ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == len(turns)
    # [INST] is a control token of v3, and the template writes it itself.
    assert ids.count(chat.controls_of(tokenizer).ids["[INST]"]) == len(turns)
    assert [text for text, learned in ours.pieces if learned] == [
        each for _, said in turns for each in (f" {said}", "</s>")
    ]


def test_jinja_with_tools_puts_no_bos_twice(v3):
    source = (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}{{ '[TOOL_CALLS]' }}"
        "{{ m.tool_calls | map(attribute='function') | list | tojson }}{{ eos_token }}{% elif m.role == 'assistant' %}"
        "{{ m.content + eos_token }}{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
    )
    call = {"id": "a", "function": {"name": "f", "arguments": '{"é": "</s>"}'}}
    one = talk(("user", "q"), Message("assistant", "", tool_calls=[call]))
    ours = chat.render(one, JinjaTemplate(source), v3)
    called = '[{"name": "f", "arguments": {"é": "</s>"}}]'
    assert ours.pieces[-3:] == [("[TOOL_CALLS]", True), (called, True), ("</s>", True)]
    assert (ours.ids == v3.bos_token_id).sum() == 1
    assert (ours.ids == v3.eos_token_id).sum() == 1


LATER = "{% for m in messages %}{{ m.content }}{% if loop.last %}</s>{% endif %}{% endfor %}"


NO_HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"


JINJA_FAULTS = {
    "{% for %}": "cannot be read",
    "{% generation %}": "cannot be read",
    LATER: "message 2 cannot be told from the rendered chat template: enclose it",
    NO_HEAD: "message 2 cannot be told from the rendered chat template: enclose it",
    "{{ raise_exception('No such role.') }}": "cannot render this (No such role): change",
    "{{ messages[9].content }}": "cannot render this",
    "{{ 1 / 0 }}": "cannot render this",
    "{{ strftime_now('%Y') }}": "cannot render this",
    "{{ messages.append(1) }}": "cannot render this",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "cannot render this",
    "{% for i in range(10 ** 9) %}{% endfor %}": "cannot render this",
    "{% generation %}x{% endgeneration %}": "encloses 1 turns in {% generation %}, and the assistant speaks 2 times",
    "{{ messages[0].content | tojson(ensure_ascii=true) }}": "escapes a control token",
}


@pytest.mark.parametrize("source", JINJA_FAULTS)
def test_jinja_that_cannot_be_used_says_why(source, v1):
    one = talk(("user", "<s>"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(DataError) as caught:
        chat.render(one, JinjaTemplate(source), v1)
    assert_sentence(caught.value, JINJA_FAULTS[source])


def test_load_template(v1, tmp_path):
    assert chat.load_template("vicuna", v1) is chat.vicuna
    with pytest.raises(
        DataError, match=r"unknown: use auto, mistral-v1, mistral-v3, vicuna, tokenizer.*Did you mean 'mistral-v1'"
    ):
        chat.load_template("mistral_v1", v1)
    with pytest.raises(DataError, match="tokenizer v1 has no chat_template of its own"):
        chat.load_template("tokenizer", v1)
    v1.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for source in (MIXTRAL, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": MIXTRAL}]):
        path.write_text(json.dumps({**config, "chat_template": source}), encoding="utf-8")
        found = chat.load_template("tokenizer", load_tokenizer(tmp_path))
        assert isinstance(found, JinjaTemplate)
        assert found.source == MIXTRAL
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    found = chat.load_template("tokenizer", load_tokenizer(tmp_path))
    assert isinstance(found, JinjaTemplate)
    assert found.source == CHATML


def test_auto_is_what_the_vocabulary_was_made_for(v1, v3, tmp_path):
    assert chat.load_template("auto", v1) is chat.mistral_v1
    assert chat.load_template("auto", v3) is chat.mistral_v3
    v1.save(tmp_path / "same")
    (tmp_path / "same/chat_template.jinja").write_text(CHATML, encoding="utf-8")
    assert chat.load_template("auto", load_tokenizer(tmp_path / "same")) is chat.mistral_v1
    other = with_tokens(v1, tmp_path / "other", ["<|im_start|>", "<|im_end|>"])
    assert chat.load_template("auto", other) is chat.mistral_v1
    (tmp_path / "other/chat_template.jinja").write_text(CHATML, encoding="utf-8")
    found = chat.load_template("auto", load_tokenizer(tmp_path / "other"))
    assert isinstance(found, JinjaTemplate)
    assert found.source == CHATML


def test_fingerprints_differ_and_hold(v1, v3):
    kinds = [
        *((template, v3) for template in chat.TEMPLATES.values()),
        (JinjaTemplate(CHATML), v1),
        (JinjaTemplate(LATER), v1),
    ]
    found = [chat.fingerprint(template, tokenizer) for template, tokenizer in kinds]
    assert len(set(found)) == len(found)
    assert found == [chat.fingerprint(template, tokenizer) for template, tokenizer in kinds]


@pytest.fixture(scope="module")
def with_ends(tmp_path_factory: pytest.TempPathFactory, v1: Tokenizer) -> Tokenizer:
    return with_tokens(v1, tmp_path_factory.mktemp("tokens") / "with", ("<|im_start|>", "<|im_end|>"))


@given(said=st.lists(content.filter(str.strip), min_size=2, max_size=6))
@settings(max_examples=20)
def test_what_precedes_an_answer_is_what_preceded_it_in_training(
    v1: Tokenizer, with_ends: Tokenizer, said: list[str]
) -> None:
    *before, (_, text) = zip(("user", "assistant") * 3, said[: len(said) // 2 * 2], strict=False)
    turns = [Message(role, text, trained=False) for role, text in before]  # type: ignore[arg-type]
    for source, tokenizer, end in ((CHATML, with_ends, "<|im_end|>"), (MIXTRAL, v1, "</s>"), (TAGGED, v1, "</s>")):
        template = JinjaTemplate(source)
        asked = chat.prompt_of(talk(*turns), template, tokenizer)
        try:
            whole = chat.render(talk(*turns, Message("assistant", text)), template, tokenizer)
        except DataError:  # an answer that cannot be told from the rendered text is refused in training too
            continue
        learned = whole.ids[: int(whole.trained.argmax())].tolist()
        assert learned[: len(asked.ids)] == asked.ids
        # The space between the two is the answer's, unless an answer has no token that begins with one, as digits have.
        assert tokenizer.decode([1, *learned[len(asked.ids) :]]) in ("", "\n")
        assert tokenizer._bpe.id_to_token(asked.end_ids[0]) == end
