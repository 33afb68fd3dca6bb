"""Made-up representations on real tokenizers: conversations, seeded top-k tables and spans, without any model.

The distribution at each place is a seeded draw over candidates that make life hard for a mapping: prefixes and
extensions of the actual token, the actual token most of the time, special ids now and then.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from functools import cache
from pathlib import Path

import numpy as np

from fusechat_fuse.store.shard_writer import ShardWriter
from fusechat_fuse.store.shards import load_representation
from fusechat_fuse.store.tokenizers import save_tokenizer
from fusechat_fuse.text.spans import token_spans
from fusechat_fuse.text.tokens import token_table, tokenizer_hash

HEADERS = {"gpt4": "GPT4 Correct Assistant: ", "plain": "", "line": "assistant\n"}
_vocabularies: dict = {}


def _sorted_vocabulary(tokenizer):
    if id(tokenizer) not in _vocabularies:
        table = token_table(tokenizer).bytes
        spelled = sorted((piece, i) for i, piece in enumerate(table) if piece)
        _vocabularies[id(tokenizer)] = (tokenizer, [p for p, _ in spelled], [i for _, i in spelled], table)
    return _vocabularies[id(tokenizer)][1:]


@cache
def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def candidates(tokenizer, actual: int, rng: random.Random, K: int) -> list[int]:
    """K distinct ids: mostly the actual one, its prefixes, its extensions, neighbours, any."""
    pieces, ids, table = _sorted_vocabulary(tokenizer)
    own, size = table[actual], len(table)
    if size <= K:
        return rng.sample(range(size), size)
    chosen: list[int] = [actual] if rng.random() < 0.85 else []
    while len(chosen) < K:
        kind = rng.random()
        if own is None or kind < 0.2:
            i = rng.randrange(size)
        elif kind < 0.4:
            stem = own[: rng.randint(1, len(own))]
            at = bisect_left(pieces, stem)
            i = ids[at] if at < len(ids) else 0
        else:
            stem = own[: rng.randint(1, len(own))]
            at = bisect_left(pieces, stem) + rng.randrange(40)
            i = ids[min(at, len(ids) - 1)]
        if i not in chosen and i != actual:
            chosen.append(i)
        elif rng.random() < 0.05:
            i = rng.randrange(size)
            if i not in chosen and i != actual:
                chosen.append(i)
    rng.shuffle(chosen)
    return chosen


def make_row(
    tokenizer,
    name: str,
    contents: list[str],
    *,
    header: str,
    end_of_turn: int,
    K: int,
    seed: int,
    cut=None,
    blanks=False,
):
    """One representation row: assistant messages `contents`, each after `header` (`blanks`: whose last blank the model
    writes) and before the end of turn."""
    rng = random.Random(_seed(f"{seed}/{name}/{tokenizer_key(tokenizer)}"))
    K = min(K, len(tokenizer))
    closing = tokenizer.convert_ids_to_tokens(end_of_turn)
    text, places = "", []
    for content in contents:
        text += header
        written = blanks * (len(header) - len(header.rstrip(" ")))
        places.append((written, len(text.encode()), len((text + content).encode())))
        text += content + closing
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start, end = token_spans(tokenizer, text, ids)
    if cut:
        ids, start, end = ids[:cut], start[:cut], end[:cut]
    rows = []
    for t, (i, s, e) in enumerate(zip(ids, start.tolist(), end.tolist())):
        for m, (written, low, high) in enumerate(places):
            if i == end_of_turn and s == high:
                rows.append((t, m, high - low, high - low + 1))
            elif e > low and s < high and e > s:
                rows.append((t, m, max(s, low) - low, min(e, high) - low))
            elif low - written <= s <= e <= low and s < low:
                rows.append((t, m, 0, 0))  # the blank between the generation prompt and the content
    predicted, message, begin, stop = (np.array(column, np.int32) for column in zip(*rows))
    topk_ids = np.array([candidates(tokenizer, ids[t], rng, K) for t in predicted], np.int32).reshape(-1, K)
    noise = np.random.default_rng(rng.randrange(2**32)).gumbel(size=(len(predicted), K)) * 2.0
    kept = np.log(np.random.default_rng(rng.randrange(2**32)).uniform(0.4, 0.98, size=(len(predicted), 1)))
    kept = np.zeros_like(kept) if len(tokenizer) == K else kept
    logprobs = noise - np.log(np.exp(noise).sum(1, keepdims=True)) + kept
    order = np.argsort(-logprobs, axis=1, kind="stable")
    topk_ids = np.take_along_axis(topk_ids, order, 1)
    logprobs = np.take_along_axis(logprobs, order, 1).astype(np.float16)
    actual = np.array(ids, np.int64)[predicted]
    same = topk_ids == actual[:, None]
    tail = np.log(np.maximum(1 - np.exp(logprobs.astype(np.float64)).sum(1), 1e-9)) - rng.random() * 3
    ce = np.where(same.any(1), -(same * logprobs.astype(np.float64)).sum(1), -tail).astype(np.float32)
    return {
        "id": name,
        "content_hash": hashlib.sha256(repr(contents).encode()).hexdigest()[:16],
        "input_ids": np.array(ids, np.int32),
        "predicted": predicted,
        "message": message.astype(np.int16),
        "start": begin,
        "end": stop,
        "topk_ids": topk_ids,
        "topk_logprobs": logprobs,
        "ce": ce,
    }


_keys: dict = {}


def tokenizer_key(tokenizer) -> str:
    if id(tokenizer) not in _keys:
        _keys[id(tokenizer)] = (tokenizer, tokenizer_hash(tokenizer))
    return _keys[id(tokenizer)][1]


def write_representation(path, tokenizer, rows: list[dict], *, end_of_turn: int, shard=64, vocab_size=None):
    """The rows as a representation directory."""
    about = {"sha256": tokenizer_key(tokenizer), "class": type(tokenizer).__name__, "bos_id": tokenizer.bos_token_id}
    about |= {"eos_id": tokenizer.eos_token_id, "end_of_turn_id": end_of_turn}
    model = {"name": "made up", "fingerprint": about["sha256"][:8], "vocab_size": vocab_size or len(tokenizer)}
    writer = ShardWriter(path, {"made_of": tokenizer_key(tokenizer), "n": len(rows)}, kind="representation")
    save_tokenizer(tokenizer, path)
    count = -(-len(rows) // shard)
    for n in range(count):
        writer.write(n, rows[n * shard : (n + 1) * shard])
    writer.finish(count, {"tokenizer": about, "model": model, "template": "made up", "options": {}, "versions": {}})
    return load_representation(path)


TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 12345 and 3.14159!",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\r\n",
    "你好,世界。今天天气怎么样?我们一起去公园吧。",
    "Emoji 👩‍👩‍👧‍👦🏳️‍🌈 and ½ № naïve café, Ελληνικά, العربية, हिन्दी",
    "   spaces    and\n\n\n\ttabs  \n  ",
    "a▁b ▁▁ c ▁",
    "Donaudampfschifffahrtsgesellschaftskapitän pneumonoultramicroscopicsilicovolcanoconiosis",
    "yes",
    " leading blank and trailing ",
    "then they thence there; hello helloworld HelloWorld THEN",
)


def end_of_turn(tokenizer) -> int:
    return tokenizer.eos_token_id


def rows_for(tokenizer, seed=0, K=5, names=None, repeat=1, **extra):
    """A row of each of TEXTS, `repeat` times over; `extra`: further columns, their values in turn."""
    rows = []
    for n in range(len(TEXTS) * repeat):
        text = TEXTS[n % len(TEXTS)]
        name = names[n] if names else f"c{n}"
        row = make_row(
            tokenizer, name, [text], header=HEADERS["gpt4"], end_of_turn=end_of_turn(tokenizer), K=K, seed=seed
        )
        rows.append(row | {key: values[n % len(values)] for key, values in extra.items()})
    return rows


def write(path, tokenizer, rows, **options):
    """The rows as a representation directory with the tokenizer's own end of turn."""
    return write_representation(path, tokenizer, rows, end_of_turn=end_of_turn(tokenizer), **options)


def files_of(folder) -> dict[str, bytes]:
    """What is in a directory: {path: bytes}."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}
