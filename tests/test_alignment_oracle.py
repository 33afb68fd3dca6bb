"""The vectorised mappings against plain loops, on made-up distributions over real and tiny tokenizers."""

import random
import unicodedata

import numpy as np
import pytest

from fusechat_fuse.alignment.certificate import FLOOR, tally
from fusechat_fuse.alignment.mappings import MAPPINGS
from fusechat_fuse.alignment.streams import align_batch, make_batch
from fusechat_fuse.alignment.tokenizer_pair import TokenizerPair
from fusechat_fuse.alignment.vocabulary_maps import AlignedCounts
from tests.helpers import reference_alignment as reference
from tests.helpers.alignment_data import HEADERS, TEXTS, end_of_turn, make_row, write_representation
from tests.helpers.random_texts import random_texts

pytestmark = pytest.mark.slow

PAIRS = [
    ("openchat", "qwen"),
    ("qwen", "openchat"),
    pytest.param("openchat", "llama3", marks=pytest.mark.slow),
    pytest.param("qwen", "llama3", marks=pytest.mark.slow),
    ("tiny_bpe", "tiny_unigram"),
    ("tiny_unigram", "tiny_bpe"),
]


@pytest.fixture(scope="session")
def pair_of(request, tmp_path_factory):
    """(pivot name, source name) -> TokenizerPair, its representations' rows made by one conversation each."""
    known = {}

    def get(pivot: str, source: str) -> TokenizerPair:
        if (pivot, source) not in known:
            folder = tmp_path_factory.mktemp("pair")
            opened = []
            for role, name in (("pivot", pivot), ("source", source)):
                tokenizer = request.getfixturevalue(name)
                row = make_row(tokenizer, "x", ["text"], header="", end_of_turn=end_of_turn(tokenizer), K=2, seed=0)
                opened.append(write_representation(folder / role, tokenizer, [row], end_of_turn=end_of_turn(tokenizer)))
            known[pivot, source] = TokenizerPair(*opened, folder / "cache")
        return known[pivot, source]

    return get


def tokens_of(row, *, source: bool) -> list[dict]:
    """Those with bytes: others take no part."""
    tokens = []
    for n, t in enumerate(row["predicted"]):
        if row["start"][n] == row["end"][n]:
            continue
        token = {"id": int(row["input_ids"][t])}
        token |= {name: int(row[name][n]) for name in ("message", "start", "end")}
        if source:
            kept = {int(i): float(np.exp(np.float32(lp))) for i, lp in zip(row["topk_ids"][n], row["topk_logprobs"][n])}
            token["kept"] = kept
            token["P"] = float(np.exp(-np.float64(row["ce"][n])))
            token["others"] = {i: p for i, p in kept.items() if i != token["id"]}
        tokens.append(token)
    return tokens


def conversations(seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    texts = [*TEXTS, *random_texts(seed, 5)]
    texts = [text.strip(" ") or "x" for text in texts] if seed % 2 else texts
    return [[text] if rng.random() < 0.5 else [text, rng.choice(texts)] for text in texts if text]


def cases(request, pivot: str, source: str, seed: int, headers=("gpt4", "gpt4"), K=6, cut=None, only=None):
    """(pivot row, source row, contents) of each conversation both tokenizers can spell."""
    p_tok, s_tok = request.getfixturevalue(pivot), request.getfixturevalue(source)
    for n, contents in enumerate(conversations(seed)[:only]):
        contents = [unicodedata.normalize("NFC", text) for text in contents]
        p = make_row(
            p_tok,
            f"c{n}",
            contents,
            header=HEADERS[headers[0]],
            end_of_turn=end_of_turn(p_tok),
            K=K,
            seed=seed,
            blanks=True,
        )
        s = make_row(
            s_tok,
            f"c{n}",
            contents,
            header=HEADERS[headers[1]],
            end_of_turn=end_of_turn(s_tok),
            K=K,
            seed=seed + 1,
            cut=cut,
            blanks=True,
        )
        yield p, s, contents


def row_dict(ids, probs) -> dict[int, float]:
    kept = ids >= 0
    assert len(set(ids[kept].tolist())) == kept.sum(), "an id stands twice in one row"
    return dict(zip(ids[kept].tolist(), probs[kept].tolist()))


def assert_equal_rows(got: dict, expected: dict, where) -> None:
    assert got.keys() == expected.keys(), where
    for i, probability in expected.items():
        assert abs(got[i] - probability) <= 1e-6 * probability + 1e-12, (where, i)


def check_prefix(request, pair, pivot, source, **options):
    vocab = pair.vocabularies(MAPPINGS["prefix"])
    cached: dict[bytes, list[int]] = {}

    def path(piece: bytes) -> list[int]:
        if piece not in cached:
            cached[piece] = pair.speller.paths([piece])[0]
        return cached[piece]

    stats = {"tokens": 0, "answered": 0, "inside": 0}
    for p, s, contents in cases(request, pivot, source, **options):
        batch = make_batch([p], [s], pair)
        mapped = align_batch(batch, pair, vocab, MAPPINGS["prefix"], False)
        pivot_tokens, source_tokens = tokens_of(p, source=False), tokens_of(s, source=True)
        texts = {m: content.encode() for m, content in enumerate(contents)}
        expected = reference.prefix(
            pivot_tokens,
            source_tokens,
            texts,
            path,
            pair.pivot.bytes,
            pair.source.bytes,
            pair.pivot.end_of_turn,
            pair.source.end_of_turn,
        )
        for n, answer in enumerate(expected):
            stats["tokens"] += 1
            if answer is None:
                assert not mapped.answered[n]
                assert (mapped.ids[n] == -1).all()
                continue
            kind, row = answer
            stats["answered"] += 1
            stats["inside"] += kind == "inside"
            assert mapped.kind[n] == {"exact": 1, "inside": 2}[kind]
            got = row_dict(mapped.ids[n], mapped.probs[n])
            assert_equal_rows(got, row, (contents, n, kind))
            assert max(got) < len(pair.pivot.bytes)
            assert sum(got.values()) == pytest.approx(mapped.mass[n])
            assert mapped.mass[n] < 1 + 2e-3  # the stored float16 log-probabilities may add up to a little over 1
        own = [None if a is None else a[1][t["id"]] for a, t in zip(expected, pivot_tokens)]
        bits = reference.gap(pivot_tokens, source_tokens, own)
        counted = tally(batch, mapped)
        assert counted["covered_bytes"][0] == bits[2]
        assert counted["source_bits"][0] == pytest.approx(bits[0], rel=1e-9, abs=1e-9)
        assert counted["aligned_bits"][0] == pytest.approx(bits[1], rel=1e-9, abs=1e-9)
        assert counted["aligned_bits"][0] == pytest.approx(counted["source_bits"][0], rel=1e-6, abs=1e-6)
    return stats


@pytest.mark.parametrize(("pivot", "source"), PAIRS)
def test_prefix_equals_the_loops(pivot, source, pair_of, request):
    stats = check_prefix(request, pair_of(pivot, source), pivot, source, seed=2)
    assert stats["answered"] == stats["tokens"]
    assert stats["inside"] > 10


@pytest.mark.parametrize(("pivot", "source"), [("tiny_bpe", "tiny_unigram"), ("tiny_unigram", "tiny_bpe")])
def test_prefix_with_the_whole_vocabulary_kept(pivot, source, pair_of, request):
    stats = check_prefix(request, pair_of(pivot, source), pivot, source, seed=6, K=10_000, only=5)
    assert stats["answered"] == stats["tokens"]


@pytest.mark.parametrize(
    ("pivot", "source"), [("openchat", "qwen"), ("qwen", "openchat"), ("tiny_unigram", "tiny_bpe")]
)
@pytest.mark.parametrize("headers", [("gpt4", "line"), ("plain", "gpt4"), ("plain", "plain")])
def test_prefix_with_native_templates(pivot, source, headers, pair_of, request):
    stats = check_prefix(request, pair_of(pivot, source), pivot, source, seed=3, headers=headers)
    assert stats["answered"] == stats["tokens"]


@pytest.mark.parametrize(("pivot", "source"), [("openchat", "qwen"), ("qwen", "openchat")])
def test_prefix_where_the_source_was_truncated(pivot, source, pair_of, request):
    stats = check_prefix(request, pair_of(pivot, source), pivot, source, seed=4, cut=20)
    assert 0 < stats["answered"] < stats["tokens"]


@pytest.mark.parametrize(
    ("pivot", "source", "mapping"),
    [
        *[("tiny_bpe", "tiny_unigram", mapping) for mapping in ("exact", "statistics", "min_edit")],
        ("openchat", "tiny_bpe", "min_edit"),
        ("openchat", "qwen", "exact"),
        ("openchat", "qwen", "statistics"),
    ],
)
@pytest.mark.parametrize(
    ("headers", "cut"), [(("gpt4", "gpt4"), None), (("plain", "gpt4"), None), (("gpt4", "gpt4"), 25)]
)
def test_single_id_mappings_equal_the_loops(mapping, pivot, source, headers, cut, pair_of, request):
    pair = pair_of(pivot, source)
    rng = np.random.default_rng(0)
    counts = AlignedCounts.of(
        rng.integers(0, len(pair.source.bytes), 500), rng.integers(0, len(pair.pivot.bytes), 500), len(pair.pivot.bytes)
    )
    vocab = pair.vocabularies(MAPPINGS[mapping], counts)
    for p, s, contents in cases(request, pivot, source, seed=5, headers=headers, cut=cut):
        batch = make_batch([p], [s], pair)
        mapped = align_batch(batch, pair, vocab, MAPPINGS[mapping], False)
        expected = reference.single(
            tokens_of(p, source=False),
            tokens_of(s, source=True),
            {m: content.encode() for m, content in enumerate(contents)},
            vocab.to_pivot,
            pair.by_bytes,
            pair.pivot.bytes,
            pair.source.bytes,
        )
        for n, (answered, row, mass) in enumerate(expected):
            assert mapped.answered[n] == answered
            assert_equal_rows(row_dict(mapped.ids[n], mapped.probs[n]), row, (contents, n))
            assert mapped.mass[n] == pytest.approx(mass, rel=1e-6)
        own = [
            max(row.get(t["id"], 0.0), FLOOR) if answered else None
            for (answered, row, _), t in zip(expected, tokens_of(p, source=False))
        ]
        bits = reference.gap(tokens_of(p, source=False), tokens_of(s, source=True), own)
        counted = tally(batch, mapped)
        assert counted["covered_bytes"][0] == bits[2]
        assert counted["source_bits"][0] == pytest.approx(bits[0], rel=1e-6, abs=1e-9)
        assert counted["aligned_bits"][0] == pytest.approx(bits[1], rel=1e-6, abs=1e-9)
        assert counted["one_hot"][0] == sum(not answered for answered, _, _ in expected)
