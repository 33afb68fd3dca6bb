"""Quality of the mappings in bits per byte, on small language models with real vocabularies.

    python -m tests.benchmarks.bench_align_quality [--chunks 60]

Three trigram models (openchat, qwen, llama3 ids) are trained on Python's documentation and standard library; held-out
text is represented (top 10 and the exact cross-entropy of every token) and aligned by every mapping, in both
directions, and by the released rules re-enacted. Gap 0 is perfect; `prefix` must have it at over 99 % coverage.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from fusechat_fuse.alignment.certificate import certificate, tally
from fusechat_fuse.alignment.run import align
from fusechat_fuse.alignment.sparse_rows import Mapped
from fusechat_fuse.alignment.streams import make_batch
from fusechat_fuse.alignment.tokenizer_pair import TokenizerPair
from tests.benchmarks import released_rules
from tests.helpers import real_tokenizers
from tests.helpers.alignment_data import end_of_turn, make_row, write_representation

MAPPINGS_UNDER_TEST = ("prefix", "statistics", "min_edit", "exact")
MODULES = ("argparse", "ast", "asyncio.tasks", "configparser", "datetime", "decimal", "difflib", "email.message")
MODULES += ("inspect", "json.decoder", "logging", "os", "pathlib", "statistics", "subprocess", "typing", "zipfile")


def corpus() -> list[str]:
    """Paragraphs of documentation and of source text, about 1.4 MB."""
    import importlib

    texts = real_tokenizers.tiny_corpus()
    for name in MODULES:
        module = importlib.import_module(name if name != "decimal" else "_pydecimal")
        texts += inspect.getsource(module).split("\n\n")
    return [text for text in texts if 40 < len(text) < 1200 and text.isascii()]


class Trigram:
    """Interpolated trigram model: each order backs off to the next by its number of distinct followers."""

    def __init__(self, sequences: list[list[int]], size: int):
        self.size, self.follow = size, [Counter(), defaultdict(Counter), defaultdict(Counter)]
        for ids in sequences:
            ids = [-1, -1, *ids]
            for a, b, c in zip(ids, ids[1:], ids[2:]):
                self.follow[0][c] += 1
                self.follow[1][b][c] += 1
                self.follow[2][a, b][c] += 1
        self.total = self.follow[0].total()
        self.common = [i for i, _ in self.follow[0].most_common(60)]

    def probability(self, a: int, b: int, c: int) -> float:
        """P(c | a, b)."""
        kinds = len(self.follow[0])
        p = (self.follow[0][c] + kinds / self.size) / (self.total + kinds)
        for seen in (self.follow[1].get(b), self.follow[2].get((a, b))):
            if seen:
                p = (seen.get(c, 0) + len(seen) * p) / (seen.total() + len(seen))
        return p

    def top(self, a: int, b: int, K: int) -> list[tuple[float, int]]:
        """The K most likely next ids."""
        near = Counter(self.follow[1].get(b, ())).most_common(200)
        ids = {*self.follow[2].get((a, b), ()), *(i for i, _ in near), *self.common}
        return sorted(((self.probability(a, b, i), i) for i in ids), key=lambda entry: (-entry[0], entry[1]))[:K]


def represented(tokenizer, model: Trigram, texts: list[str], K: int = 10) -> list[dict]:
    """Rows of held-out texts with the model's distributions."""
    rows = []
    for n, text in enumerate(texts):
        row = make_row(
            tokenizer, f"t{n}", [text], header="Assistant: ", end_of_turn=end_of_turn(tokenizer), K=1, seed=0
        )
        ids = [-1, -1, *row["input_ids"].tolist()]
        tops, ce = [], []
        for t in row["predicted"].tolist():
            tops.append(model.top(ids[t], ids[t + 1], K))
            ce.append(-np.log(model.probability(ids[t], ids[t + 1], ids[t + 2])))
        row["topk_ids"] = np.array([[i for _, i in top] for top in tops], np.int32)
        row["topk_logprobs"] = np.log([[p for p, _ in top] for top in tops]).astype(np.float16)
        row["ce"] = np.array(ce, np.float32)
        rows.append(row)
    return rows


def train(tokenizer, texts: list[str]) -> Trigram:
    closing = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
    sequences = [tokenizer(f"Assistant: {text}{closing}", add_special_tokens=False).input_ids for text in texts]
    return Trigram(sequences, len(tokenizer))


def released(pivot_rows, source_rows, pair: TokenizerPair, tokenizers, marks) -> dict:
    """Certificate of the re-enacted released rules."""
    base_tok, source_tok = tokenizers
    decoded, warps, counts = [], [], Counter()
    for p, s in zip(pivot_rows, source_rows):
        sides = [[t.decode([int(i)]) for i in row["input_ids"]] for t, row in ((base_tok, p), (source_tok, s))]
        decoded.append(sides)
        warps.append(released_rules.warp(sides[1], sides[0]))
        for i, positions in enumerate(warps[-1]):
            counts.update({(int(s["input_ids"][j]), int(p["input_ids"][i])) for j in positions})
    chosen = released_rules.statistics_choice(counts, pair.source.pieces, pair.pivot.pieces, marks)
    names = {piece: i for i, piece in enumerate(pair.pivot.pieces) if piece is not None}
    same = {}
    for i, piece in enumerate(pair.source.pieces):
        if piece is not None and (there := names.get(piece.replace(*marks))) is not None:
            same[i] = there
    sums: Counter = Counter()
    for p, s, (base, source), warped in zip(pivot_rows, source_rows, decoded, warps):
        K = s["topk_ids"].shape[1]
        after_ids = np.full((len(s["input_ids"]), K), -1)  # of the prediction after each position
        after_logs = np.full((len(s["input_ids"]), K), -np.inf)
        after_ids[s["predicted"] - 1], after_logs[s["predicted"] - 1] = s["topk_ids"], s["topk_logprobs"]
        made = released_rules.rows(
            p["input_ids"], s["input_ids"], warped, base, source, after_ids, after_logs, same, chosen
        )
        batch = make_batch([p], [s], pair)
        match, P = batch.match, len(batch.pivot)
        ids, probs = np.full((P, K), -1, np.int32), np.zeros((P, K))
        answered = np.zeros(P, bool)
        for n, t in enumerate(p["predicted"].tolist()):
            row = made[t - 1]
            if row is None:
                ids[n, 0], probs[n, 0] = p["input_ids"][t], 1.0
            else:
                answered[n] = True
                ids[n, : len(row)], probs[n, : len(row)] = list(row), list(row.values())
        mapped = Mapped(
            ids, probs, np.full(P, -np.inf), answered, probs.sum(1), np.where(answered, match.kind, 0), np.zeros(P)
        )
        sums.update({name: float(value[0]) for name, value in tally(batch, mapped).items()})
    return certificate(dict(sums))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chunks", type=int, default=60, help="held-out texts")
    options = parser.parse_args()
    texts = corpus()
    held = texts[:: max(len(texts) // options.chunks, 1)][: options.chunks]
    known = [text for text in texts if text not in set(held)]
    tokenizers = {name: getattr(real_tokenizers, name)() for name in ("openchat", "qwen", "llama3")}
    marks = {"openchat": "▁", "qwen": "Ġ", "llama3": "Ġ"}
    folder, results = Path(tempfile.mkdtemp()), []
    try:
        rows, opened = {}, {}
        for name, tokenizer in tokenizers.items():
            rows[name] = represented(tokenizer, train(tokenizer, known), held)
            opened[name] = write_representation(
                folder / name, tokenizer, rows[name], end_of_turn=end_of_turn(tokenizer)
            )
        pairs = [("openchat", "qwen"), ("qwen", "openchat"), ("openchat", "llama3"), ("llama3", "openchat")]
        for pivot, source in pairs:
            for mapping in MAPPINGS_UNDER_TEST:
                if mapping == "min_edit" and pivot == "openchat" and source == "llama3":
                    continue  # minutes of map building; the other three pairs show it
                out = folder / f"{pivot}-{source}-{mapping}"
                manifest = align(opened[pivot].path, opened[source].path, out, mapping=mapping)
                results.append({"pivot": pivot, "source": source, "mapping": mapping, **manifest["certificate"]["all"]})
            pair = TokenizerPair(opened[pivot], opened[source])
            both = (tokenizers[pivot], tokenizers[source])
            figures = released(rows[pivot], rows[source], pair, both, (marks[source], marks[pivot]))
            results.append({"pivot": pivot, "source": source, "mapping": "released", **figures})
    finally:
        shutil.rmtree(folder)
    print("pivot     source    mapping     answered   mass  actual missing  source   aligned      gap  (bits per byte)")
    for r in results:
        print(
            f"{r['pivot']:<9} {r['source']:<9} {r['mapping']:<11} {r['coverage']:7.2%} {r['mean_mapped_mass']:7.3f}"
            f"  {r['without_actual']:12.2%}  {r['source_bits_per_byte']:7.4f}  {r['aligned_bits_per_byte']:8.4f}"
            f"  {r['gap_bits_per_byte']:+8.4f}"
        )
    for r in results:
        if r["mapping"] == "prefix":
            assert abs(r["gap_bits_per_byte"]) < 1e-6, r
            assert r["coverage"] > 0.99, r
    print(json.dumps(results))


if __name__ == "__main__":
    main()
