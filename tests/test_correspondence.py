"""Which source prediction answers which pivot prediction, and which starts are safe."""

import numpy as np
import pytest

from fusechat_fuse.alignment.correspondence import (
    EXACT,
    INSIDE,
    NONE,
    correspond,
    joined_bytes,
    line_up,
    message_of,
    safe_starts,
)


def test_correspondence_by_hand():
    match = correspond(*map(np.array, ([0, 3, 5, 9, 20], [3, 5, 9, 12, 24], [0, 2, 5, 9], [2, 5, 9, 10])))
    assert match.kind.tolist() == [EXACT, INSIDE, EXACT, EXACT, NONE]
    assert match.source.tolist() == [0, 1, 2, 3, -1]
    empty = np.zeros(0, np.int64)
    assert correspond(np.array([0]), np.array([1]), empty, empty).kind.tolist() == [NONE]
    assert len(correspond(empty, empty, np.array([0]), np.array([1])).kind) == 0


@pytest.mark.parametrize("seed", range(20))
def test_correspondence_is_symmetric_and_by_two_pointers(seed):
    rng = np.random.default_rng(seed)

    def cut(length):
        inner = np.flatnonzero(rng.random(length - 1) < 0.4) + 1
        edges = np.concatenate([[0], inner, [length]])
        kept = rng.random(len(edges) - 1) < 0.9  # holes
        return edges[:-1][kept], edges[1:][kept]

    (ps, pe), (ss, se) = cut(200), cut(200)
    there, back = correspond(ps, pe, ss, se), correspond(ss, se, ps, pe)
    common = {(p, there.source[p]) for p in np.flatnonzero(there.kind == EXACT)}
    assert common == {(back.source[q], q) for q in np.flatnonzero(back.kind == EXACT)}
    for p in range(len(ps)):
        covering = [q for q in range(len(ss)) if ss[q] <= ps[p] < se[q]]
        assert there.source[p] == (covering[0] if covering else -1)


def test_messages_lie_apart_on_the_line():
    conversation, message, position = (np.array(x) for x in ([0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 2**31 - 1, 0, 0, 7]))
    place = line_up(conversation, message, position)
    assert (np.diff(place) > 0).all()
    of = message_of(place)
    assert (np.diff(of) > 0).tolist() == [False, True, True, False]


def test_safe_starts_are_those_no_token_could_span():
    joined = joined_bytes([b" the", b"ab", None, b"c", b"b."])
    assert {(a, b) for a, b in np.argwhere(joined).tolist()} == {
        *zip(b" th", b"the"),
        (ord("a"), ord("b")),
        (ord("b"), ord(".")),
    }
    match = correspond(np.arange(6), np.arange(1, 7), np.arange(0, 6, 1)[[0, 1, 2, 3, 5]], np.array([1, 2, 3, 5, 6]))
    first, before = np.array([97, 98, 99, 100, 100, -1]), np.array([-1, 97, 98, 99, 100, 100])
    header = np.array([True, False, False, False, False, False])
    safe = safe_starts(match, np.arange(6), first, before, header, joined)
    # header; 'a|b' is joined; 'b|c', 'c|d' are not; inside a source token; the end of turn
    assert safe.tolist() == [False, False, True, True, False, True]
