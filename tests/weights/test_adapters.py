"""LoRA adapters: PEFT's folders both ways, held against peft itself, and everything that can be wrong with one."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import TINY, logits_of, mixtral, our_logits, random, transformers_model
from torch import Tensor

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.model.settings import LoraConfig, ModelConfig
from ostro.weights import convert, open_reader
from ostro.weights.adapters import Adapter, open_adapter, read_peft, write_peft
from ostro.weights.merged import Merged

# What they tell each other.
pytestmark = pytest.mark.filterwarnings("ignore:::(transformers|peft)")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TRAINED = {
    "everything": {
        "target_modules": [*ATTENTION, "lm_head", "embed_tokens"],
        "target_parameters": ["mlp.gate.weight", *EXPERTS],
    },
    "rslora, gate and up alone": {
        "target_modules": [],
        "target_parameters": EXPERTS[:1],
        "use_rslora": True,
    },
    "down alone": {"target_modules": [], "target_parameters": EXPERTS[1:]},
    "dora": {"target_modules": [*ATTENTION, "lm_head"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": EXPERTS,
        "rank_pattern": {"q_proj": 2, "mlp.experts.down_proj": 7},
        "alpha_pattern": {"1.self_attn.v_proj": 3, ".*gate_up_proj": 5},
    },
    "one layer, the router as a module": {"target_modules": ["gate", "k_proj"], "layers_to_transform": 1},
}
OLD = "base_model.model.model.layers.{}.block_sparse_moe.experts.{}.{}.{}.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model of transformers'."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    transformers_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_logits(base: Path) -> Tensor:
    return our_logits(mixtral(open_reader(base)))


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def trained(**settings: Any) -> Any:
    """Return peft's model with random A and B."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = get_peft_model(transformers_model(), PeftConfig(r=3, lora_alpha=6, **settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(
                    torch.randn(value.shape, generator=generator), alpha=0.2 * max(0.2, value.abs().mean().item())
                )
    return model


def peft_logits(folder: Path) -> Tensor:
    from peft import PeftModel

    return logits_of(PeftModel.from_pretrained(transformers_model(), folder).eval())


@pytest.mark.parametrize("name", TRAINED)
def test_peft_and_we_compute_the_same(name: str, base: Path, base_logits: Tensor, tmp_path: Path):
    model = trained(**TRAINED[name])
    model.save_pretrained(tmp_path / "theirs")
    expected = logits_of(model)
    assert apart(base_logits, expected) > 0.05
    adapter = open_adapter(tmp_path / "theirs", TINY)
    assert apart(our_logits(mixtral(Merged(open_reader(base), adapter))), expected) < 1e-5
    write_peft(tmp_path / "ours", adapter, TINY, "some/base")
    assert apart(peft_logits(tmp_path / "ours"), expected) < 1e-5
    again = read_peft(tmp_path / "ours", TINY)
    assert again.lora == adapter.lora
    assert all(torch.equal(again.tensors[key], value) for key, value in adapter.tensors.items())
    if "rank_pattern" not in TRAINED[name] and "layers_to_transform" not in TRAINED[name]:
        theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
        assert ours.keys() == {key for key in theirs if "base_layer.weight" not in key}
        assert all(torch.equal(theirs[key], value) for key, value in ours.items())


def old_adapter(folder: Path, weights: tuple[str, ...] = ("w1", "w2", "w3"), **settings: Any) -> dict[str, Tensor]:
    """Write what peft wrote of transformers 4's Mixtral: each expert's matrices corrected alone."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer in range(TINY.num_hidden_layers):
        for expert in range(TINY.num_local_experts):
            for weight in weights:
                sizes = (TINY.hidden_size, TINY.intermediate_size)
                inner, out = sizes[::-1] if weight == "w2" else sizes
                for part, shape in (("lora_A", (3, inner)), ("lora_B", (out, 3))):
                    value = 0.2 * torch.randn(shape, generator=generator)
                    tensors[OLD.format(layer, expert, weight, part)] = value
        gate = f"base_model.model.model.layers.{layer}.block_sparse_moe.gate"
        tensors[f"{gate}.lora_A.weight"] = 0.2 * torch.randn(3, TINY.hidden_size, generator=generator)
        tensors[f"{gate}.lora_B.weight"] = 0.2 * torch.randn(TINY.num_local_experts, 3, generator=generator)
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["gate", *weights], **settings}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return tensors


def test_separate_experts_of_transformers_4(base: Path, base_logits: Tensor, tmp_path: Path):
    old_adapter(tmp_path / "old")
    adapter = read_peft(tmp_path / "old", TINY)
    assert (adapter.lora.rank, adapter.lora.scale) == (6, 2.0)
    merged = our_logits(mixtral(Merged(open_reader(base), adapter)))
    assert apart(merged, base_logits) > 0.05
    assert apart(merged, peft_logits(tmp_path / "old")) < 1e-5
    write_peft(tmp_path / "new", adapter, TINY, "base")
    assert apart(peft_logits(tmp_path / "new"), merged) < 1e-5


@pytest.mark.parametrize("weights", [("w1", "w2", "w3"), ("w3",), ("w2",)])
def test_separate_experts_keep_their_scale(weights: tuple[str, ...], tmp_path: Path):
    # peft 0.21 doubles rank and alpha of w1 and w3 with rslora too, which makes the correction √2 of what was trained.
    tensors = old_adapter(tmp_path / "old", weights, use_rslora=True)
    source = random()
    merged = Merged(source, read_peft(tmp_path / "old", TINY))
    for layer in range(2):
        experts = f"model.layers.{layer}.block_sparse_moe.experts."
        for expert in range(TINY.num_local_experts):
            for weight, place in (("w1", ("w13", expert, 0)), ("w3", ("w13", expert, 1)), ("w2", ("w2", expert))):
                name, where = experts + place[0], place[1:]
                expected = source.read(name, where)
                if weight in weights:
                    a, b = (tensors[OLD.format(layer, expert, weight, part)] for part in ("lora_A", "lora_B"))
                    expected = expected + 6 / math.sqrt(3) * b @ a
                assert torch.allclose(merged.read(name, where), expected, atol=1e-6), (name, where)


def test_dropout_of_separate_experts_is_of_training_alone(tmp_path: Path):
    old_adapter(tmp_path / "old", lora_dropout=0.1)
    adapter = read_peft(tmp_path / "old", TINY)
    assert adapter.lora.dropout == 0
    assert "its dropout of 0.1 in training is left out" in " ".join(adapter.notes)


WIDE = ModelConfig(
    vocab_size=150,
    hidden_size=80,
    intermediate_size=130,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=3,
)
ALL = LoraConfig(targets=("attention", "experts", "router", "lm_head", "embeddings"), rank=5, alpha=7.0)
DORA = LoraConfig(targets=("attention", "lm_head"), rank=5, alpha=7.0, dora=True)


def drawn(lora: LoraConfig, config: ModelConfig = WIDE, size: float = 0.1) -> Adapter:
    generator = torch.Generator().manual_seed(3)
    table = layout.adapter_table(config, lora)
    return Adapter(lora, {name: size * torch.randn(p.shape, generator=generator) for name, p in table.items()})


def merged_by_hand(name: str, weight: Tensor, adapter: Adapter) -> Tensor:
    """Return W + scale·B·A, of DoRA with its rows brought to their magnitudes."""
    prefix = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    a, b = (adapter.tensors.get(f"{prefix}lora_{part}") for part in "AB")
    if a is None or b is None:
        return weight
    if name.endswith("w13"):
        delta = torch.einsum("ehfr,erd->ehfd", b, a)
    elif name.endswith("w2"):
        delta = torch.einsum("edr,erf->edf", b, a)
    else:
        delta = (b @ a).T if "embed" in name else b @ a
    merged = weight + adapter.lora.scale * delta
    if adapter.lora.dora:
        merged *= (adapter.tensors[f"{prefix}lora_magnitude"] / merged.norm(dim=1))[:, None]
    return merged


@pytest.mark.parametrize("lora", [ALL, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_have_the_bits_of_the_whole(lora: LoraConfig, dtype: torch.dtype):
    source, adapter = random(WIDE), drawn(lora)
    infos = {name: dataclasses.replace(info, dtype=dtype) for name, info in source.names().items()}
    merged = Merged(source, adapter, infos)
    for name, parameter in layout.table(WIDE).items():
        whole = merged.read(name)
        assert whole.dtype == dtype
        expected = merged_by_hand(name, source.read(name), adapter)
        assert apart(whole.float(), expected) < (1e-6 if dtype == torch.float32 else 4e-3)
        if len(parameter.shape) == 1:
            continue
        for rows in (slice(None), slice(1, 2), slice(63, 66), slice(0, None, 3), slice(2, 2), 0, -1):
            for columns in ((), (slice(3, 40),), (7,)):
                stack = (1,) * (len(parameter.shape) - 2)
                assert torch.equal(merged.read(name, (*stack, rows, *columns)), whole[(*stack, rows, *columns)]), name
        assert torch.equal(merged.read(name, (slice(1, None),)), whole[1:])


def test_rounded_once(tmp_path: Path):
    # In fp32 the correction is kept, which a base that had been rounded to bf16 before, or a bf16 sum, would lose.
    source, adapter = random(WIDE), drawn(ALL, size=1e-3)
    convert(source, tmp_path / "out", to="hf", dtype=torch.bfloat16, adapter=adapter)
    name = "lm_head.weight"
    expected = merged_by_hand(name, source.read(name), adapter).bfloat16()
    assert torch.equal(open_reader(tmp_path / "out").read(name), expected)


def test_a_tied_embedding_alone_is_corrected():
    config = dataclasses.replace(WIDE, tie_word_embeddings=True)
    source, adapter = random(config), drawn(LoraConfig(targets=("embeddings",)), config)
    merged = Merged(source, adapter)
    assert not merged.model.tie_word_embeddings
    assert list(merged.names()) == list(layout.table(merged.model))
    assert torch.equal(merged.read("lm_head.weight"), source.read("model.embed_tokens.weight"))
    expected = merged_by_hand("model.embed_tokens.weight", source.read("model.embed_tokens.weight"), adapter)
    assert torch.allclose(merged.read("model.embed_tokens.weight"), expected, atol=1e-6)


def test_a_base_with_another_embedding_is_refused(tmp_path: Path):
    adapter = drawn(LoraConfig(targets=("embeddings", "lm_head")), TINY)
    write_peft(tmp_path / "a", adapter, TINY, "base")
    held = load_file(tmp_path / "a" / "adapter_model.safetensors")
    source = random()
    for shift, is_same in ((0.0, True), (0.5, False)):
        held["base_model.model.lm_head.base_layer.weight"] = (source.read("lm_head.weight") + shift).bfloat16()
        save_file(held, tmp_path / "a" / "adapter_model.safetensors")
        again = read_peft(tmp_path / "a", TINY)
        if is_same:
            Merged(source, again)
        else:
            with pytest.raises(WeightsError, match=r"another lm_head\.weight than the base's"):
                Merged(source, again)
    held["base_model.model.lm_head.base_layer.weight"] = torch.zeros(49, 16)
    save_file(held, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=r"\(49, 16\), the base has \(48, 16\)"):
        Merged(source, read_peft(tmp_path / "a", TINY))


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    write_peft(tmp_path / "a", drawn(LoraConfig(rank=4), TINY), TINY, "base")
    return tmp_path / "a"


def test_written_whole_or_not_at_all(sound: Path, tmp_path: Path):
    other = drawn(LoraConfig(rank=2), TINY)
    with pytest.raises(WeightsError, match="exists and is not empty"):
        write_peft(sound, other, TINY, "base")
    assert read_peft(sound, TINY).lora.rank == 4
    write_peft(sound, other, TINY, "base", replace=True)
    assert read_peft(sound, TINY).lora.rank == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_run_directory_has_its_adapter_inside(sound: Path, tmp_path: Path):
    shutil.move(sound, tmp_path / "run" / "adapter")
    assert open_adapter(tmp_path / "run", TINY).lora.rank == 4
    with pytest.raises(WeightsError, match="holds no adapter_config"):
        open_adapter(tmp_path, TINY)


def test_pickled_adapters_are_read(sound: Path):
    expected = read_peft(sound, TINY)
    file = sound / "adapter_model.safetensors"
    torch.save(load_file(file), sound / "adapter_model.bin")
    file.unlink()
    found = read_peft(sound, TINY)
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3': Ostro reads 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\], which Ostro's LoRA has no counterpart"),
        ({"bias": "all"}, "bias='all', which"),
        ({"lora_bias": True}, "lora_bias=True, which"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"invented_later": {"a": 1}}, "invented_later"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base's weights too"),
        ({"use_dora": True}, "lora.dora is for attention and lm_head alone"),
        ({"r": 5}, r"shape \(12, 16\), where this model and adapter_config.json ask for \(15, 16\)"),
        ({"r": 0}, "0 for r: a number above 0"),
        ({"r": "4"}, "'4' for r"),
        ({"lora_alpha": None}, "None for lora_alpha"),
        ({"lora_dropout": 2}, "lora_dropout=2"),
        ({"rank_pattern": {"q_proj": -1}}, "-1 for q_proj"),
        ({"rank_pattern": ["q_proj"]}, "an object belongs there"),
        ({"alpha_pattern": {"q_proj(": 1}}, "no regular expression"),
        ({"layers_to_transform": "1"}, "a list of layers"),
    ],
)
def test_what_cannot_be_expressed_is_refused(sound: Path, settings: dict[str, Any], sentence: str):
    path = sound / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(WeightsError, match=sentence):
        read_peft(sound, TINY)


ONE = "base_model.model.model.layers.1.self_attn.q_proj."


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({f"{ONE}lora_B.weight": None}, r"lacks lora_B of model\.layers\.1\.self_attn\.q_proj"),
        ({f"{ONE}lora_A.weight": None, f"{ONE}lora_B.weight": None}, r"lacks 2 .* first model\.layers\.1\.self_attn"),
        ({f"{ONE}lora_A.weight": torch.full((4, 16), math.nan)}, r"q_proj\.lora_A of .* holds NaN in 64"),
        ({f"{ONE}lora_A.weight": torch.zeros(4, 17)}, r"shape \(4, 17\)"),
        ({f"{ONE}lora_A.weight": torch.zeros(4, 16, dtype=torch.int8)}, "floating-point"),
        ({f"{ONE}lora_magnitude_vector": torch.ones(16)}, "lora_magnitude"),
        ({"base_model.model.lm_head.weight": torch.zeros(48, 16)}, "which is no tensor of a LoRA adapter"),
        (
            {ONE.replace("q_proj", "qkv") + f"lora_{part}.weight": torch.zeros(4, 4) for part in "AB"},
            "qkv, which this model has not",
        ),
        (
            {ONE.replace("layers.1", "layers.2") + f"lora_{part}.weight": torch.zeros(4, 4) for part in "AB"},
            r"layers\.2\.self_attn\.q_proj, which this model has not",
        ),
    ],
)
def test_other_tensors_are_refused(sound: Path, changes: dict[str, Tensor | None], sentence: str):
    path = sound / "adapter_model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    with pytest.raises(WeightsError, match=sentence):
        read_peft(sound, TINY)


def test_a_layer_that_is_not_meant_to_be_left_out_is_missed(sound: Path):
    path = sound / "adapter_config.json"
    fields = json.loads(path.read_text())
    tensors = load_file(sound / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if "layers.0" not in name}, sound / "adapter_model.safetensors")
    for layers, is_whole in (([1], True), ([0], False), (None, False)):
        path.write_text(json.dumps(fields | {"layers_to_transform": layers}))
        if is_whole:
            assert not read_peft(sound, TINY).tensors["model.layers.0.self_attn.q_proj.lora_B"].any()
        else:
            with pytest.raises(WeightsError, match=r"lacks 12 .* first model\.layers\.0"):
                read_peft(sound, TINY)


@pytest.mark.parametrize(
    ("field", "sentence"),
    [("num_local_experts", "shape"), ("intermediate_size", "shape"), ("num_hidden_layers", "lacks")],
)
def test_the_adapter_of_another_model_is_refused(sound: Path, field: str, sentence: str):
    with pytest.raises(WeightsError, match=sentence):
        read_peft(sound, dataclasses.replace(TINY, **{field: getattr(TINY, field) + 1}))


def test_separate_experts_must_be_whole(tmp_path: Path):
    old_adapter(tmp_path / "old")
    path = tmp_path / "old" / "adapter_model.safetensors"
    tensors = load_file(path)
    for part in ("lora_A", "lora_B"):
        del tensors[OLD.format(1, 2, "w3", part)]
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="of other experts than the 3 of"):
        read_peft(tmp_path / "old", TINY)
    save_file({name: value for name, value in tensors.items() if ".gate." not in name}, path)
    with pytest.raises(WeightsError, match="of other experts than the 2 of"):
        read_peft(tmp_path / "old", dataclasses.replace(TINY, num_local_experts=2))


def test_truncated_is_refused(sound: Path):
    path = sound / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="truncated"):
        read_peft(sound, TINY)
    path.unlink()
    with pytest.raises(WeightsError, match="adapter_model"):
        read_peft(sound, TINY)


@pytest.mark.parametrize("to", ["hf", "mistral", "mindspore-gmm", "dcp"])
def test_merged_into_any_format(to: str, tmp_path: Path):
    source, adapter = random(), drawn(ALL, TINY)
    made = convert(source, tmp_path / "out", to=to, adapter=adapter, verify=True)
    assert made.sha256
    for name, value in layout.table(TINY).items():
        written = open_reader(tmp_path / "out").read(name)
        assert written.shape == value.shape
        assert torch.allclose(written, merged_by_hand(name, source.read(name), adapter), atol=1e-6)
