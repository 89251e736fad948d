"""docs/from-mindformers.md, in both languages: its commands run on small files of the same names, its flags exist.

What the commands do is asserted elsewhere: records in data/test_mindformers_style.py, conversions in
weights/test_mindspore*.py, launching in parallel/test_launch.py, recipes in test_migrate.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import typer
import yaml
from test_readme import blocks_of, line_faults, parse_fault

from ostro import config
from ostro.cli import app, main
from ostro.data import workers
from ostro.model.settings import ModelConfig
from ostro.weights import RandomReader, convert

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/from-mindformers.md", "docs/from-mindformers.zh.md")
SMALL = ModelConfig(
    vocab_size=400,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    initializer_range=0.01,
)
SIZES = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "n_kv_heads": 4,
    "seq_length": 512,
    "compute_dtype": "float32",
}
ONE_PROCESS = {"data_parallel": 1, "model_parallel": 1, "expert_parallel": 1, "pipeline_stage": 1}
LAUNCH = (
    "--nproc-per-node",
    "--nnodes",
    "--node-rank",
    "--master-addr",
    "--master-port",
    "--log-dir",
    "--rdzv-timeout",
)
TEXT = "The robin is a small bird of the woods, and it sings.\n"
RUN_MINDFORMER = (
    "config mode device_id device_target run_mode do_eval train_dataset_dir eval_dataset_dir predict_data "
    "modal_type predict_batch_size adapter_id load_checkpoint src_strategy_path_or_dir auto_trans_ckpt "
    "transform_process_num only_save_strategy resume_training strategy_load_checkpoint remote_save_url seed "
    "use_parallel profile options epochs batch_size gradient_accumulation_steps sink_mode num_samples output_dir "
    "register_path do_sample trust_remote_code"
)
SCRIPTS = (
    "dataset_type input_glob output_file tokenizer model_file file_partition repeat samples_num seq_length "
    "data_path output_path torch_ckpt_dir mindspore_ckpt_path use_gmm pre_ckpt_path dtype reversed input_path "
    "qkv_concat telechat_type is_lora strategy_dir src_ckpt_strategy dst_ckpt_strategy src_ckpt_dir dst_ckpt_dir "
    "prefix src_checkpoint dst_checkpoint_dir src_strategy dst_strategy rank_id world_size transform_by_rank"
)


def page(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def spans(text: str) -> list[str]:
    """Return the inline code of a page, in order."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def commands(name: str) -> list[str]:
    """Return the page's `ostro` commands, each once: those of its blocks, then those in its text and tables."""
    in_blocks = [command for block in blocks_of(name) if not block.needs for command in block.text.splitlines()]
    in_text = [span for span in spans(page(name)) if span.startswith("ostro ") and len(span.split()) > 2]
    return list(dict.fromkeys([*in_blocks, *in_text]))


def without_launch(words: list[str]) -> list[str]:
    """Return a command as it is for one process."""
    kept, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word in LAUNCH:
            rest.pop(0)
        else:
            kept.append(word)
    return kept


def small_yaml(name: str) -> str:
    """Return a YAML of the seed's for a small model in one process."""
    fields = yaml.safe_load((ROOT / f"tests/migrations/{name}.yaml").read_text("utf-8"))
    fields["model"]["model_config"] |= SIZES
    fields["parallel_config"] |= ONE_PROCESS | {"micro_batch_num": 1}
    fields["runner_config"]["epochs"] = 1
    fields["processor"] = {"tokenizer": {"type": "LlamaTokenizer", "vocab_file": "tokenizer.model"}}
    return yaml.safe_dump(fields, sort_keys=False)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have, in the working directory, small files by the names that the page uses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(workers, "_SMALL_BYTES", 1 << 30)  # MindRecord's files are sparse: they look large
    presets = tmp_path / "presets"
    shutil.copytree(config.PRESETS, presets)
    (presets / "small.yaml").write_text(yaml.safe_dump(SMALL.as_fields()), "utf-8")
    monkeypatch.setattr(config, "PRESETS", presets)
    folder = tmp_path / "stage"
    folder.mkdir()
    monkeypatch.chdir(folder)
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_prefix="tokenizer",
        vocab_size=SMALL.vocab_size,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **rules,
    )
    convert(RandomReader(SMALL), Path("torch_ckpt_dir"), to="hf")
    shutil.copy("tokenizer.model", "torch_ckpt_dir")
    assert (
        main(["convert", "torch_ckpt_dir", "output", "--to", "mindspore", "--layout", "dp=2,mp=2,ep=2,pp=2,opt=1"]) == 0
    )
    Path("wiki.train.tokens").write_text(f" \n = Robin = \n \n {TEXT.replace('.', ' . ') * 60} \n \n", "utf-8")
    pairs = [{"instruction": f"Name bird {i}.", "input": "", "output": f"Robin {i}."} for i in range(3)]
    Path("alpaca_data.json").write_text(json.dumps(pairs), "utf-8")
    for name in ("pretrain", "finetune", "predict"):
        Path(f"{name}_mixtral-8x7b.yaml").write_text(small_yaml(name), "utf-8")
    return folder


def test_every_command_runs(stage: Path, capsys: pytest.CaptureFixture[str]):
    found = commands(PAGES[0])
    assert len(found) > 25
    done: list[list[str]] = []
    for command in found:
        words = shlex.split(command.replace("4096", "512").replace(" 256", " 16"))[1:]
        alone = without_launch(words)
        assert alone == words or parse_fault(app, words) is None, command
        if words[0] == "download":  # the network; tests/weights/test_download.py has a server of its own
            continue
        if alone in done:
            continue
        done.append(alone)
        status = main(alone)
        assert status == 0, f"{command}\n{capsys.readouterr().err}"
    made = ["wiki512.mindrecord", "mixtral-hf", "target_checkpoint", "gmm2.ckpt", "model_dir/checkpoint", "from_ranks"]
    assert [name for name in made if not (stage / name).exists()] == []
    for name in ("pretrain", "finetune"):
        assert list((stage / f"runs/{name}_mixtral-8x7b/checkpoints").glob("step-*"))


@pytest.mark.parametrize("name", PAGES)
def test_commands_that_need_more_are_understood(name: str):
    blocks = [block for block in blocks_of(name) if block.needs]
    assert blocks
    assert [fault for block in blocks for fault in line_faults(app, set(), block.text)] == []


def test_both_pages_hold_the_same_commands():
    english, chinese = (
        [(block.needs, block.commands()) for block in blocks_of(name)] + rows_of_code(page(name)) for name in PAGES
    )
    assert english == chinese


def rows_of_code(text: str) -> list[tuple[str, ...]]:
    """Return the code in the first two columns of each row of the page's tables."""
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")]
    return [tuple(spans(" ".join(row))) for row in rows]


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_is_named(name: str):
    named = set(re.findall(r"--(\w+)", " ".join(spans(page(name)))))
    assert [flag for flag in (RUN_MINDFORMER + " " + SCRIPTS).split() if flag not in named] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_of_the_document_is_named(name: str, shared: Path):
    document = (shared / "reference" / "seed_document.txt").read_text("utf-8")
    named = set(re.findall(r"--(\w+)", " ".join(spans(page(name)))))
    assert set(re.findall(r"(?<![\w-])--([a-z]\w+)", document)) - named == set()


def every_option(command: object) -> Iterator[str]:
    for parameter in getattr(command, "params", ()):
        yield from parameter.opts
    for inner in getattr(command, "commands", {}).values():
        yield from every_option(inner)


@pytest.mark.parametrize("name", PAGES)
def test_what_stands_beside_a_flag_exists(name: str):
    known = {*every_option(typer.main.get_command(app)), "--a.b"}
    verbs = set(getattr(typer.main.get_command(app), "commands", {}))
    rows = [line.split("|") for line in page(name).splitlines() if line.startswith("| ")]
    beside = [span for row in rows for span in spans(row[2])]
    flags = [span.split()[0] for span in beside if span.startswith("--")]
    keys = [span.partition("=")[0] for span in beside if re.fullmatch(r"[a-z]{2,}\.[a-z_]+=\S*", span)]
    assert len(flags) > 20
    assert len(keys) > 30
    assert [flag for flag in flags if flag not in known] == []
    assert [key for key in keys if key.rpartition(".")[2] not in config.known_keys(key)] == []
    assert [span for span in spans(page(name)) if span.startswith("ostro ") and span.split()[1] not in verbs] == []


def test_the_small_model_is_what_the_small_yaml_says(tmp_path: Path):
    from ostro.migrate import translate

    (tmp_path / "small.yaml").write_text(small_yaml("predict"), "utf-8")
    model = yaml.safe_load(translate(tmp_path / "small.yaml"))["model"]
    assert dataclasses.replace(SMALL, **model) == SMALL
