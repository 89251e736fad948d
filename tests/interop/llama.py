"""llama.cpp beside Ostro: what `convert --to gguf` writes must load there and answer with the same tokens.

Not collected by pytest, as it needs llama-cpp-python in a Python of its own, which compiles it for minutes:

    python tests/interop/llama.py --python PATH_OF_THAT_PYTHON

A small Mixtral with the v1 vocabulary, once with random weights and once taught a text by heart, is written in every
type. Greedy ids of both sides must be equal, token for token, and the logits behind the prompts within LIMITS. To a
quantised file the ids do not apply: llama.cpp rounds the activations to 8 bits as well, Ostro computes with the
file's own values in float32. Then texts must become the same ids in both tokenizers. Exit code 1 where anything fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.model.mixtral import Mixtral
from ostro.model.settings import ModelConfig
from ostro.model.spans import spans_of
from ostro.serve.engine import Engine
from ostro.serve.load import load_model
from ostro.serve.sampling import Sampling
from ostro.weights import ModuleReader, RandomReader, Reader, load_into
from ostro.weights.gguf import open_reader, write
from ostro.weights.store import CastReader

NEW_TOKENS = 48
# The root mean square of the logits' differences over that of the logits. float32 is as in Ostro; with the others
# llama.cpp rounds activations to the type of the weights (8 bits where those are quantised).
LIMITS = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2, "q8_0": 2e-2, "q4_0": 2e-2}
SIZES = ModelConfig(
    vocab_size=32000,
    hidden_size=128,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    initializer_range=0.08,
)
TIED = dataclasses.replace(SIZES, tie_word_embeddings=True, head_dim=64, rope_theta=1e4)
TEXT = (
    "Ostro is the south wind of the Mediterranean, warm and damp, and it often brings rain. Tramontana comes from "
    "the north across the mountains, cold and dry. Levante rises in the east and Ponente in the west; between them "
    "stand Greco, Scirocco, Libeccio and Maestro. Sailors drew all eight on the compass rose of their charts."
)
PROMPTS = ("Ostro is the south", "Tramontana comes", "Levante rises in the", "Sailors drew all", "warm and damp, and")
TEXTS = (*PROMPTS, TEXT, "", " two  spaces", "naïve 東風 🧭\n\n\ttabs", "x = [1,2];  # <s> is text", "0123456789 ½")

# Runs in the other Python. Logits, not a sampler, decide: nothing there penalises repetition.
CHILD = """
import json, sys
import llama_cpp as ll
import numpy as np
job = json.load(sys.stdin)
silent = ll.llama_log_callback(lambda *_: None)
ll.llama_log_set(silent, None)
ll.llama_backend_init()
model = ll.llama_model_load_from_file(job["path"].encode(), ll.llama_model_default_params())
if not model:
    sys.exit("llama.cpp refuses " + job["path"])
vocab = ll.llama_model_get_vocab(model)
size = ll.llama_vocab_n_tokens(vocab)
settings = ll.llama_context_default_params()
settings.n_ctx, settings.n_threads, settings.n_threads_batch = 256, 1, 1
settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
settings.flash_attn_type = 0
answers, prompt_logits = [], []
for prompt in job["prompts"]:
    context = ll.llama_init_from_model(model, settings)
    ids, fed = list(prompt), 0
    while len(ids) < len(prompt) + job["new_tokens"]:
        fresh = (ll.llama_token * (len(ids) - fed))(*ids[fed:])
        if ll.llama_decode(context, ll.llama_batch_get_one(fresh, len(fresh))):
            sys.exit("llama_decode failed")
        fed = len(ids)
        logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(context, -1), (size,))
        if len(ids) == len(prompt):
            prompt_logits.append(logits.tolist())
        ids.append(int(logits.argmax()))
    answers.append(ids[len(prompt):])
    ll.llama_free(context)
tokens = []
for text in job["texts"]:
    room = (ll.llama_token * 4096)()
    data = text.encode()
    count = ll.llama_tokenize(vocab, data, len(data), room, len(room), True, False)
    tokens.append(list(room[:count]))
json.dump({"answers": answers, "logits": prompt_logits, "tokens": tokens}, sys.stdout)
"""


def main() -> int:
    """Print the table; return the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--python", required=True, help="a Python that has llama-cpp-python")
    python = options.parse_args().python
    torch.set_num_threads(1)
    words = load_tokenizer("v1")
    sources: dict[str, Reader] = {
        "random": RandomReader(SIZES),
        "taught": _taught(SIZES, words),
        "taught, tied": _taught(TIED, words),
    }
    failed = 0
    print(f"{'weights':14} {'file':6} {'vocabulary':10} {'equal ids':>10}    of {'logits differ by':>17}")
    with tempfile.TemporaryDirectory() as folder:
        for name, reader in sources.items():
            for kind in ("f32", "bf16", "f16", "q8_0", "q4_0") if name != "random" else ("f32",):
                failed += not _row(python, Path(folder) / f"{name} {kind}.gguf", name, reader, kind, words)
        failed += not _row(python, Path(folder) / "bare.gguf", "taught", sources["taught"], "f32", words, bare=True)
        differing = _tokenize(python, Path(folder) / "taught f32.gguf", words)
    print(f"\ntokenizer: {len(TEXTS) - len(differing)} of {len(TEXTS)} texts have equal ids")
    for text, ours, theirs in differing:
        print(f"  {text!r}: {ours} here, {theirs} there")
    print("all as it should be" if not failed and not differing else "something differs")
    return int(bool(failed or differing))


def _row(
    python: str, path: Path, name: str, reader: Reader, kind: str, words: Tokenizer, *, bare: bool = False
) -> bool:
    """Write one file, let both answer, print one line; return whether they agree."""
    exact = {"bf16": torch.bfloat16, "f16": torch.float16}.get(kind)
    source = CastReader(reader, exact) if exact else reader
    write(source, path, quantization=None if exact else kind, tokenizer=None if bare else words.save)
    held = open_reader(path)
    held.check()
    model = load_model(held, "fp32", torch.device("cpu"))
    prompts = [words.encode(prompt, bos=True) for prompt in PROMPTS]
    found = _ask(python, {"path": str(path), "prompts": prompts, "new_tokens": NEW_TOKENS, "texts": []})
    answers = Engine(model, words).generate(PROMPTS, Sampling(temperature=0.0, max_new_tokens=NEW_TOKENS))
    # Ours end at EOS, which theirs go on from.
    pairs = [(a.token_ids, b[: len(a.token_ids)]) for a, b in zip(answers, found["answers"], strict=True)]
    equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True))
    total = sum(len(a) for a, _ in pairs)
    gap = max(_gap(model, ids, theirs) for ids, theirs in zip(prompts, found["logits"], strict=True))
    print(f"{name:14} {kind:6} {'none' if bare else 'v1':10} {equal:10d} {total:5d} {gap:17.1e}", flush=True)
    has_equal_ids = kind.startswith("q") or (equal == total and total >= 32 * len(PROMPTS))
    return has_equal_ids and gap <= LIMITS[kind]


@torch.inference_mode()
def _gap(model: Mixtral, ids: list[int], theirs: list[float]) -> float:
    """Return how far the logits behind a prompt are apart, relative to their own size."""
    ours = model.logits(model(torch.tensor(ids), spans_of([len(ids)]))[-1:])[0]
    return ((ours - torch.tensor(theirs)).square().mean() / ours.square().mean()).sqrt().item()


def _tokenize(python: str, path: Path, words: Tokenizer) -> list[tuple[str, list[int], list[int]]]:
    job = {"path": str(path), "prompts": [], "new_tokens": 0, "texts": TEXTS}
    theirs = _ask(python, job)["tokens"]
    ours = [words.encode(text, bos=True) for text in TEXTS]
    return [(text, a, b) for text, a, b in zip(TEXTS, ours, theirs, strict=True) if a != b]


def _ask(python: str, job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run([python, "-c", CHILD], input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def _taught(config: ModelConfig, words: Tokenizer) -> Reader:
    """Return a model that knows the text by heart: its answers have margins that rounding does not cross."""
    model = Mixtral(config)
    load_into(model, RandomReader(config, seed=1))
    ids = torch.tensor(words.encode(f"{TEXT} {TEXT}", bos=True))
    spans = spans_of([len(ids) - 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(80):
        loss = functional.cross_entropy(model.logits(model(ids[:-1], spans)), ids[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ModuleReader(model, config)


if __name__ == "__main__":
    sys.exit(main())
