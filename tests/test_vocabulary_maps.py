"""Vocabulary maps: by bytes, nearest by edit distance, most often aligned."""

import random

import numpy as np

from fusechat_fuse.alignment.speller import Speller
from fusechat_fuse.alignment.vocabulary_maps import (
    AlignedCounts,
    _one_edit_away,
    exact_map,
    min_edit_map,
    preferred_ids,
    statistics_map,
)
from fusechat_fuse.text.tokens import token_table
from tests.helpers.reference_alignment import levenshtein


def by_bytes(tokenizer):
    speller = Speller(tokenizer)
    return preferred_ids(speller.bytes, speller.is_byte_piece)


def test_exact_is_by_bytes_and_prefers_the_ordinary_id(openchat, qwen):
    table = by_bytes(openchat)
    mapping = exact_map(token_table(qwen).bytes, table)
    ids = {piece: qwen(piece, add_special_tokens=False).input_ids for piece in (" the", "the", "你", "A", "\n")}
    assert all(len(i) == 1 for i in ids.values())
    assert mapping[ids[" the"][0]] == openchat.convert_tokens_to_ids("▁the")
    assert mapping[ids["the"][0]] == openchat.convert_tokens_to_ids("the")
    assert mapping[ids["你"][0]] == openchat.convert_tokens_to_ids("你")  # one thing in two spellings
    assert mapping[ids["A"][0]] == openchat.convert_tokens_to_ids("A")  # not <0x41>
    assert mapping[ids["\n"][0]] == openchat.convert_tokens_to_ids("<0x0A>")
    assert mapping[qwen.convert_tokens_to_ids("<|im_end|>")] == -1
    own, there = token_table(openchat).bytes, token_table(qwen).bytes
    for i in np.flatnonzero(mapping >= 0)[::97]:
        assert own[mapping[i]] == there[i]


def random_words(rng, count, alphabet="abcde é你", longest=7) -> list[bytes]:
    return ["".join(rng.choices(alphabet, k=rng.randint(1, longest))).encode() for _ in range(count)]


def test_one_edit_away_is_every_distance_of_one():
    rng = random.Random(1)
    pivot = [(piece.decode(), i) for i, piece in enumerate(dict.fromkeys(random_words(rng, 150, longest=4)))]
    words = {piece.decode() for piece in random_words(rng, 300, longest=5)} - dict(pivot).keys()
    texts = dict(enumerate(sorted(words)))
    near = {i: [n for other, n in pivot if levenshtein(text, other) == 1] for i, text in texts.items()}
    assert dict(_one_edit_away(texts, pivot)) == {i: min(found) for i, found in near.items() if found}
    assert 20 < sum(map(bool, near.values())) < len(texts)


def test_min_edit_is_the_nearest_of_lowest_id():
    rng = random.Random(0)
    pivot = [None, *dict.fromkeys(random_words(rng, 120)), "你".encode()[:2]]
    source = [*random_words(rng, 300, longest=14), None, "你".encode()[:1], b"\xff"]
    table = preferred_ids(pivot, [False] * len(pivot))
    mapping = min_edit_map(source, table)

    def text(piece):
        return piece.decode("utf-8", "surrogateescape")

    for i, piece in enumerate(source):
        if piece is None:
            assert mapping[i] == -1
            continue
        distances = [levenshtein(text(piece), text(other)) if other else 10**6 for other in pivot]
        assert mapping[i] == int(np.argmin(distances)), piece
    assert (mapping >= 0).sum() == len(source) - 1


def test_min_edit_on_real_vocabularies(tiny_bpe, openchat):
    spelled, table = token_table(tiny_bpe).bytes, by_bytes(openchat)
    mapping = min_edit_map(spelled, table)
    own = token_table(openchat).bytes
    exact = exact_map(spelled, table)
    assert (mapping[exact >= 0] == exact[exact >= 0]).all()
    rest = [i for i, piece in enumerate(spelled) if piece and exact[i] < 0][:5]
    for i in rest:
        text = spelled[i].decode("utf-8", "surrogateescape")
        best = min((levenshtein(text, piece.decode("utf-8", "surrogateescape")), j) for piece, j in table.items())
        assert mapping[i] == best[1]
        assert own[mapping[i]] is not None


def test_statistics_take_the_most_frequent_then_the_nearest():
    pivot = [None, b"ab", b"abc", b"zz", b"a", b"abd"]
    source = [b"ab", b"abcd", b"abq", b"never", None, b"tie"]
    table = preferred_ids(pivot, [False] * len(pivot))
    pairs = [(0, 3)] * 9 + [(1, 3)] * 3 + [(1, 2)] * 2 + [(2, 3)] * 2 + [(2, 1)] * 2 + [(2, 0)] * 5 + [(4, 1)] * 4
    pairs += [(5, 5), (5, 2)]
    counts = AlignedCounts.of(np.array([s for s, _ in pairs]), np.array([p for _, p in pairs]), len(pivot))
    mapping = statistics_map(source, pivot, table, counts)
    assert mapping.tolist() == [
        1,  # the same bytes, however often something else was aligned
        3,  # the most frequent, although another is nearer
        1,  # equally frequent: the nearest; never a special token
        -1,  # never aligned
        -1,  # special
        2,  # equally frequent and near: the lowest id
    ]


def test_counts_add_up():
    rng = np.random.default_rng(0)
    source, pivot = rng.integers(0, 50, 1000), rng.integers(0, 40, 1000)
    whole = AlignedCounts.of(source, pivot, 40)
    parts = AlignedCounts.total([AlignedCounts.of(source[n::3], pivot[n::3], 40) for n in range(3)], 40)
    assert (whole.keys == parts.keys).all()
    assert (whole.counts == parts.counts).all()
    assert whole.counts.sum() == 1000
    dense = np.zeros((50, 40), int)
    np.add.at(dense, (source, pivot), 1)
    assert (dense.reshape(-1)[whole.keys] == whole.counts).all()
    empty = AlignedCounts.total([], 40)
    assert len(empty.keys) == 0
    assert statistics_map([b"x"], [b"y"], {b"y": 0}, empty).tolist() == [-1]
