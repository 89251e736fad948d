"""How fast text becomes tokens on two cores: `ostro prepare`, whole, beside bare tokenizers and other projects' tools.

    python benchmarks/prepare.py [--quick] [--large] [--json FILE] [--mindformers PYTHON:SCRIPT]
                                 [--megatron PYTHON:SCRIPT] [--datatrove PYTHON]

The text is real, distinct and the machine's own (see _corpora.py). Everyone reads the same files, read once before; two
cores, two processes or threads; contenders take turns, each in a fresh process. Ours is the wall time of the whole
command. The bare tokenizers are timed over texts that are in memory, without start-up. A slow contender gets a part
(evenly spread files) and its rate is taken between two sizes, so that its start-up does not count either. Chats are
timed in memory on both sides, ours from parsed conversations to ids and mask, with an encoder that is new each round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _corpora

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
CHATS = ("sharegpt_250.json", "sharegpt_tools_150.json", "apache2_alpaca_format.json")
CHATS += ("mlx_wwdc25_prompt_completion.jsonl",)
SEED_TOKENS_PER_SECOND = 0.18e6  # MindFormers' script, where it is not measured in this run
BARE = ("gigatoken", "sentencepiece", "tokenizers")
TROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    folder, out, tokenizer = sys.argv[1:]
    steps = [JsonlReader(folder), DocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token="</s>")]
    LocalPipelineExecutor(steps, tasks=2, workers=2, logging_dir=out + "-log").run()
"""


class Peak:
    """The most memory of a process and all below it, sampled every 20 ms: RSS, and RssAnon + RssShmem, in bytes."""

    def __init__(self, pid: int) -> None:
        self.rss = self.own = 0
        self._pid, self._stop = pid, threading.Event()

    def __enter__(self) -> Peak:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            found = [status_of(pid) for pid in tree(self._pid)]
            self.rss = max(self.rss, sum(one.get("VmRSS", 0) for one in found))
            self.own = max(self.own, sum(one.get("RssAnon", 0) + one.get("RssShmem", 0) for one in found))


def tree(pid: int) -> list[int]:
    """Return a process and those below it."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def status_of(pid: int) -> dict[str, int]:
    """Return the memory lines of a process's status in bytes."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    except OSError:
        return {}
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if len(line) == 3 and line[2] == "kB"}


def command(*words: object, cwd: Path | None = None, **env: str) -> tuple[float, Peak]:
    """Run a command; return its wall seconds and its memory."""
    two = {"OMP_NUM_THREADS": "2", "RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true", **env}
    begin = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, words)),
        cwd=cwd,
        env={**os.environ, **two},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with Peak(process.pid) as peak:
        output, _ = process.communicate()
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))[:200]}\n{output[-1500:]}")
    return seconds, peak


def ours(source: Path, out: Path) -> dict[str, Any]:
    """Return the measure of the whole command."""
    shutil.rmtree(out, ignore_errors=True)
    seconds, peak = command(sys.executable, "-m", "ostro", "prepare", source, "--out", out, "--workers", 2, cwd=ROOT)
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    shutil.rmtree(out)
    kept = {name: manifest[name] for name in ("num_tokens", "num_documents", "num_bytes", "encoder")}
    return {"seconds": seconds, "tokens": manifest["num_tokens"], "rss": peak.rss, "own": peak.own, **kept}


# Bare tokenizers, each in a process of its own


def bare(name: str, source: str) -> dict[str, Any]:
    """Return seconds and tokens of one bare tokenizer over the texts of a folder, a file, or JSON Lines."""
    path = Path(source)
    if path.suffix == ".jsonl":
        texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    elif path.is_dir():
        texts = [one.read_text("utf-8") for one in sorted(path.rglob("*.txt"))]
    else:
        texts = path.read_text("utf-8").splitlines(keepends=True)
    encode = encoder_of(name)
    begin = time.perf_counter()
    tokens = encode(texts)
    return {"seconds": time.perf_counter() - begin, "tokens": tokens}


def encoder_of(name: str) -> Callable[[list[str]], int]:
    """Return a function that encodes texts and counts the tokens."""
    from ostro.data.tokenizer import load_tokenizer

    if name == "gigatoken":
        import awkward
        from gigatoken import Tokenizer

        spec = {**json.loads(load_tokenizer("v1").spec), "added_tokens": [], "post_processor": None}
        backend = Tokenizer.from_json(json.dumps(spec)).backend
        return lambda texts: int(awkward.sum(awkward.num(backend.encode_batch(texts, parallel=True))))
    if name == "tokenizers":
        from tokenizers import Tokenizer as Bpe

        bpe = Bpe.from_str(load_tokenizer("v1").spec.decode())
        return lambda texts: sum(len(one.ids) for one in bpe.encode_batch(texts, add_special_tokens=False))
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(vocabulary()))
    return lambda texts: sum(len(processor.encode(line)) for text in texts for line in text.splitlines())


def vocabulary() -> Path:
    """Return the piece model of Mixtral that mistral-common ships."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def measured_bare(name: str, source: Path) -> dict[str, Any]:
    """Run `bare` in a process of its own."""
    code = (
        "import sys, json; sys.path[:0] = sys.argv[3:]; import prepare; print(json.dumps(prepare.bare(*sys.argv[1:3])))"
    )
    words = [sys.executable, "-c", code, name, str(source), str(Path(__file__).parent), str(ROOT)]
    env = {**os.environ, "RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}
    return json.loads(
        subprocess.run(words, check=True, capture_output=True, text=True, env=env).stdout.splitlines()[-1]
    )


# Other projects' tools


def mindformers(where: str, source: Path, out: Path) -> tuple[float, int]:
    """Run MindFormers' llama_preprocess.py over a WikiText file; return seconds and tokens (its records are 2,049)."""
    python, script = where.split(":")
    out.mkdir()
    words = ["--dataset_type", "wiki", "--input_glob", source, "--output_file", out / "a.mindrecord"]
    root = Path(script).resolve().parents[4]
    place = {"PYTHONPATH": str(root)}
    seconds, _ = command(python, script, *words, "--model_file", vocabulary(), "--seq_length", 2048, cwd=out, **place)
    code = (
        "import sys; from mindspore.mindrecord import FileReader as R; print(sum(1 for _ in R(sys.argv[1]).get_next()))"
    )
    counted = subprocess.run(
        [python, "-c", code, str(out / "a.mindrecord")], check=True, capture_output=True, text=True
    )
    return seconds, int(counted.stdout.split()[-1]) * 2049


def megatron(where: str, source: Path, out: Path) -> tuple[float, int]:
    """Run Megatron's preprocess_data.py over JSON Lines; return seconds and tokens (two bytes each in its .bin)."""
    python, script = where.split(":")
    out.mkdir()
    words = ["--input", source, "--output-prefix", out / "a", "--workers", 2, "--append-eod"]
    words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", vocabulary()]
    seconds, _ = command(python, script, *words, cwd=out)
    return seconds, sum(file.stat().st_size for file in out.glob("*.bin")) // 2


def datatrove(python: str, source: Path, out: Path) -> tuple[float, int]:
    """Run datatrove's reader and tokenizer over JSON Lines in two files; return seconds and tokens (two bytes each)."""
    from ostro.data.tokenizer import load_tokenizer

    lines = source.read_text("utf-8").splitlines(keepends=True)
    (out / "in").mkdir(parents=True)
    for at in range(2):
        (out / "in" / f"{at}.jsonl").write_text("".join(lines[at::2]), "utf-8")
    (out / "run.py").write_text(TROVE)
    load_tokenizer("v1").save(out / "tokenizer")
    seconds, _ = command(python, out / "run.py", out / "in", out / "out", out / "tokenizer" / "tokenizer.json", cwd=out)
    return seconds, sum(file.stat().st_size for file in (out / "out").rglob("*.ds")) // 2


PEERS: dict[str, tuple[str, Callable[[str, Path, Path], tuple[float, int]]]] = {
    "mindformers": ("wikitext", mindformers),
    "megatron": ("plain", megatron),
    "datatrove": ("plain", datatrove),
}


def peer(name: str, where: str, small: Path, large: Path, out: Path) -> dict[str, Any]:
    """Return seconds and tokens of a tool between two sizes of text, start-up taken away, and that of the whole."""
    run = PEERS[name][1]
    found = []
    for at, source in enumerate((small, large)):
        found.append(run(where, source, out / f"{name}-{at}"))
        shutil.rmtree(out / f"{name}-{at}")
    (few, begin), (many, end) = found
    return {"seconds": max(many - few, 1e-9), "tokens": end - begin, "whole_seconds": many, "whole_tokens": end}


# Conversations


def chat_rounds(sample: Path, version: str, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what ours and mistral-common took for the conversations of a sample, by turns."""
    from ostro.data import chat
    from ostro.data.tokenizer import load_tokenizer

    tokenizer, template = load_tokenizer(version), chat.TEMPLATES[f"mistral-{version}"]
    talks = [one for one in _corpora.chats(sample) if version == "v3" or not one.tools]
    theirs, requests = mistral(version), [request_of(one) for one in talks]
    ours_, others = [], []
    for _ in range(rounds):
        tokenizer.hurry()
        begin = time.perf_counter()
        rendered = chat.render_batch(talks, template, tokenizer)
        seconds = time.perf_counter() - begin
        ours_.append({"seconds": seconds, "tokens": sum(len(one.ids) for one in rendered)})
        begin = time.perf_counter()
        tokens = sum(len(theirs.encode_chat_completion(one).tokens) for one in requests)
        others.append({"seconds": time.perf_counter() - begin, "tokens": tokens})
        assert tokens == ours_[-1]["tokens"], (
            f"{sample.name} {version}: {ours_[-1]['tokens']} tokens here, {tokens} there"
        )
    return ours_, others


def mistral(version: str) -> Any:
    """Return mistral-common's tokenizer for conversations that the assistant ends."""
    from mistral_common.protocol.instruct import validator
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    base = getattr(MistralTokenizer, version)()
    kind = validator.MistralRequestValidatorV3 if version == "v3" else validator.MistralRequestValidator
    checks = kind(validator.ValidationMode.finetuning)
    return MistralTokenizer(base.instruct_tokenizer, checks, base._instruct_request_normalizer)


def request_of(talk: Any) -> Any:
    """Return a conversation as mistral-common's request."""
    from mistral_common.protocol.instruct import messages as m
    from mistral_common.protocol.instruct import tool_calls
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    turns: list[Any] = []
    for message in talk.messages:
        if message.role == "assistant":
            calls = [tool_calls.ToolCall.from_openai(dict(call)) for call in message.tool_calls] or None
            turns.append(m.AssistantMessage(content=message.content or None, tool_calls=calls))
        elif message.role == "tool":
            turns.append(m.ToolMessage(content=message.content, tool_call_id=message.tool_call_id))
        else:
            turns.append({"system": m.SystemMessage, "user": m.UserMessage}[message.role](content=message.content))
    tools = [tool_calls.Tool.from_openai(dict(tool)) for tool in talk.tools] or None
    return ChatCompletionRequest(messages=turns, tools=tools)


# The table


def line_of(corpus: str, contender: str, found: list[dict[str, Any]], num_bytes: int) -> dict[str, Any]:
    """Return medians and spread of some rounds."""
    rates = [one["tokens"] / one["seconds"] / 1e6 for one in found]
    return {
        "corpus": corpus,
        "contender": contender,
        "million_tokens_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "seconds": statistics.median(one["seconds"] for one in found),
        "tokens": found[0]["tokens"],
        "corpus_bytes": num_bytes,
        "rss_bytes": max((one.get("rss", 0) for one in found), default=0),
        "own_bytes": max((one.get("own", 0) for one in found), default=0),
    }


def texts(place: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the lines of plain text and of WikiText."""
    size = (20 if options.quick else 600) * 10**6
    count, num_bytes = _corpora.gather(place / "plain", size)
    print(f"plain: {count:,} distinct files, {num_bytes / 1e6:.0f} MB{', LESS THAN ASKED FOR' * (num_bytes < size)}")
    wiki = place / "reshaped.tokens"
    wiki_bytes = _corpora.as_wikitext(place / "plain", wiki, 250 * 10**6)
    print(f"wikitext (reshaped): text of it in WikiText's token format, {wiki_bytes / 1e6:.0f} MB")
    files = sorted((place / "plain").rglob("*.txt"))
    parts = {size: place / f"part-{size}.jsonl" for size in (10**6, (4 if options.quick else 10) * 10**6)}
    for part_size, path in parts.items():
        _corpora.part_of(files, path, part_size)
    slow_wiki = {size: wiki_part(wiki, place / f"part-{size}.tokens", size) for size in parts}
    (place / "lines").mkdir()
    for at in range(20):
        _corpora.part_of(files[at::20], place / "lines" / f"{at}.jsonl", num_bytes)
    corpora = {"plain": (place / "plain", num_bytes), "plain, JSON Lines": (place / "lines", num_bytes)}
    corpora |= {"wikitext (reshaped)": (wiki, wiki_bytes)}
    if DATA.exists():
        small = DATA / "wikitext2_valid.txt"
        corpora["wikitext (real, small)"] = small, small.stat().st_size
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for corpus, (source, _) in corpora.items():
            small, large = (parts if corpus == "plain" else slow_wiki).values()
            found.setdefault((corpus, "ostro prepare"), []).append(ours(source, place / "out"))
            for name in BARE if corpus != "plain, JSON Lines" else ():
                reading = source if name == "gigatoken" or "real" in corpus else large
                found.setdefault((corpus, name), []).append(measured_bare(name, reading))
            for name, (kind, _) in PEERS.items():
                where = getattr(options, name)
                if where and kind == corpus.split()[0] and "Lines" not in corpus and "real" not in corpus:
                    found.setdefault((corpus, name), []).append(peer(name, where, small, large, place))
    return [line_of(*key, rows, corpora[key[0]][1]) for key, rows in found.items()]


def wiki_part(file: Path, out: Path, num_bytes: int) -> Path:
    """Write pieces of a WikiText file, evenly spread and cut at lines, of that many bytes in all."""
    total = file.stat().st_size
    with file.open("rb") as source, out.open("wb") as target:
        for at in range(16):
            source.seek(total * at // 16)
            source.readline()
            target.writelines(source.readlines(num_bytes // 16))
    return out


def conversations(rounds: int) -> list[dict[str, Any]]:
    """Return the lines of the chat samples, both templates."""
    lines = []
    for name in CHATS if DATA.exists() else ():
        for version in ("v1", "v3"):
            pair = chat_rounds(DATA / name, version, rounds)
            for contender, rows in zip(("ostro", "mistral-common"), pair, strict=True):
                lines.append(line_of(f"{name} {version}", contender, rows, (DATA / name).stat().st_size))
    return lines


def large(place: Path, num_bytes: int) -> dict[str, Any]:
    """Return the memory and rate of the whole command over text that differs everywhere, in files of three kinds."""
    _corpora.gather(place / "words", 40 * 10**6)
    size = _corpora.permuted(place / "words", place / "large", num_bytes, seed=0)
    return line_of("large", "ostro prepare", [ours(place / "large", place / "out")], size)


def bars(lines: list[dict[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """Return each bar: what, what was reached, what it must be at least (memory: at most), whether it holds."""
    rates = {(line["corpus"], line["contender"]): line["million_tokens_per_second"] for line in lines}
    found = []
    wiki = "wikitext (reshaped)"
    if (wiki, "ostro prepare") in rates:
        seed = rates.get((wiki, "mindformers"), SEED_TOKENS_PER_SECOND / 1e6)
        known = "" if (wiki, "mindformers") in rates else " (its 0.18 M tokens/s is the reference's, not of this run)"
        found.append((f"times the seed's script, WikiText{known}", rates[wiki, "ostro prepare"] / seed, 60.0))
        for corpus in ("plain", "plain, JSON Lines"):
            share = rates[corpus, "ostro prepare"] / rates["plain", "gigatoken"]
            found.append((f"of bare gigatoken over the same text in memory, {corpus}", share, 0.7))
    for corpus in dict.fromkeys(corpus for corpus, contender in rates if contender == "mistral-common"):
        found.append(
            (f"times mistral-common, {corpus}", rates[corpus, "ostro"] / rates[corpus, "mistral-common"], 10.0)
        )
    checked = [(*one, one[1] >= one[2]) for one in found]
    for line in lines:
        if line["corpus"] == "large":
            checked.append(("GB of memory at most, large", line["own_bytes"] / 1e9, 1.0, line["own_bytes"] <= 1e9))
    return checked


def show(lines: list[dict[str, Any]]) -> None:
    """Print the table: ours is the first of each corpus, the others say how many times as fast it is."""
    head = f"{'corpus':<42}{'contender':<16}{'M tokens/s':>11}{'lowest':>9}{'highest':>9}{'ours is':>9}"
    print(f"\n{head}{'seconds':>9}{'M tokens':>10}{'RSS MB':>8}{'own MB':>8}")
    first = {}
    for line in lines:
        rate = line["million_tokens_per_second"]
        times = first.setdefault(line["corpus"], rate) / rate
        memory = "".join(
            f"{line[name] / 1e6:>8.0f}" if line[name] else f"{'':>8}" for name in ("rss_bytes", "own_bytes")
        )
        print(
            f"{line['corpus']:<42}{line['contender']:<16}{rate:>11.3f}{line['lowest']:>9.3f}{line['highest']:>9.3f}"
            f"{times:>8.2f}×{line['seconds']:>9.3f}{line['tokens'] / 1e6:>10.3f}{memory}"
        )


def main() -> None:
    """Print one table, and which bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 MB of text, few chats")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="memory alone: a corpus of 2 GB (--quick: 0.2 GB)")
    parser.add_argument("--chats", action="store_true", help="conversations alone")
    parser.add_argument("--json", type=Path, help="write the lines here too")
    parser.add_argument("--dir", type=Path, help="where the corpora are written")
    for name in PEERS:
        parser.add_argument(f"--{name}", metavar="PYTHON" if name == "datatrove" else "PYTHON:SCRIPT")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        if options.large:
            lines = [large(Path(folder), 2 * 10**8 if options.quick else 21 * 10**8)]
        else:
            for name in PEERS:
                if not options.chats and getattr(options, name) is None:
                    print(f"{name}: not measured (give --{name})")
            lines = [] if options.chats else texts(Path(folder), options)
            lines += conversations(5 if options.quick else 15)
    show(lines)
    found = bars(lines)
    print()
    for what, reached, bar, holds in found:
        print(f"{'holds' if holds else 'MISSED':<8}{reached:>8.2f} {what} (bar {bar:g})")
    if options.json:
        options.json.write_text(json.dumps({"lines": lines, "bars": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
