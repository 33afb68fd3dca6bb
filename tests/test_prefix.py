"""The prefix mapping, edge rule by edge rule, on a hand-made pair; and the worked example of its module."""

import doctest

import numpy as np
import pytest

from fusechat_fuse.alignment import prefix
from fusechat_fuse.alignment.candidate_outcomes import prefix_outcomes
from fusechat_fuse.alignment.candidates import SourceStream, Stream, Vocabularies
from fusechat_fuse.alignment.correspondence import EXACT, NONE, correspond
from fusechat_fuse.alignment.paths import PathTable
from fusechat_fuse.alignment.prefix import prefix_rows
from fusechat_fuse.alignment.sparse_rows import add_up_equal_ids

# pivot ids 0.., source ids 0.., five bytes or so of text

PIVOT = [b" the", b" th", b"e", b"n", b" ", b"the", b"y", b" then", b"ey", b"A", None, b"he", b"t", b" the n"]
SOURCE = [b" the", b" then", b" they", b" t", b"he", b" th", b"n", b" ", b"A", b"A", None, b"e", b" thez", b"the"]
END_P, END_S = PIVOT.index(None), SOURCE.index(None)


def spell(pieces):
    """Longest pivot token first."""
    paths = []
    for piece in pieces:
        path, at = [], 0
        while at < len(piece):
            fits = [i for i, own in enumerate(PIVOT) if own and piece.startswith(own, at)]
            if not fits:
                break
            path.append(max(fits, key=lambda i: (len(PIVOT[i]), -i)))
            at += len(PIVOT[path[-1]])
        paths.append(path)
    return paths


def toy_streams(pivot, source, tables, headers=(0, 0)):
    """pivot, source: [(id, start, end)]; tables: per source token ({id: P}, P(actual))."""
    table = PathTable.of([[END_P] if piece is None else spell([piece])[0] for piece in SOURCE])
    vocab = Vocabularies(PIVOT, SOURCE, None, table, spell)

    def stream(tokens, header, **more):
        ids, start, end = (np.array(column, np.int64) for column in zip(*tokens))
        first = np.zeros(len(ids), np.int64)
        first[0] = header
        return (SourceStream if more else Stream)(ids, start, end, first, **more)

    K = max(len(others) for others, _ in tables)
    ids, logs = np.full((len(source), K), -1), np.full((len(source), K), -np.inf)
    for n, (others, _) in enumerate(tables):
        for k, (i, p) in enumerate(others.items()):
            ids[n, k], logs[n, k] = i, np.log(p)
    ce = -np.log([own for _, own in tables])
    p = stream(pivot, headers[0])
    s = stream(source, headers[1], ce=ce, topk_ids=ids, topk_logprobs=logs)
    return p, s, correspond(p.start, p.end, s.start, s.end), vocab


def toy(*args, **kwargs):
    """Mapped, and its rows as {bytes: P}."""
    out = prefix_rows(*toy_streams(*args, **kwargs))
    rows = [
        {PIVOT[i] or "end": round(float(v), 6) for i, v in zip(row_i, row_p) if i >= 0}
        for row_i, row_p in zip(out.ids, out.probs)
    ]
    return out, rows


def test_longer_words_do_not_inflate_the_actual_token():
    # pivot and source both write ' the': ' then' and ' they' begin with it, but are other words
    _, rows = toy([(0, 0, 4)], [(0, 0, 4)], [({1: 0.2, 2: 0.1, 3: 0.05}, 0.5)])
    assert rows == [{b" the": 0.5, b" then": 0.2, b" ": 0.05}]  # ' they' has the path ' the','y': unmapped


def test_inside_a_source_token_only_what_is_still_alive_counts():
    # source ' they' is ' the' + 'y' for the pivot: at 'y' the candidates that began with ' the' are alive
    _, rows = toy([(0, 0, 4), (6, 4, 5)], [(2, 0, 5)], [({0: 0.3, 12: 0.1, 3: 0.2}, 0.25)])
    assert rows[0] == {b" the": 0.65, b" ": 0.2}
    assert rows[1] == {b"y": round(0.25 / 0.65, 6)}


def test_same_bytes_in_two_ids_add_up():
    _, rows = toy([(4, 0, 1)], [(7, 0, 1)], [({8: 0.2, 9: 0.1}, 0.5)])
    assert rows == [{b"A": 0.3, b" ": 0.5}]


def test_same_bytes_do_not_add_up_on_the_actual_token():
    _, rows = toy([(9, 0, 1)], [(8, 0, 1)], [({9: 0.3}, 0.5)])
    assert rows == [{b"A": 0.5}]


def test_special_tokens_only_by_role():
    _, rows = toy([(0, 0, 4)], [(0, 0, 4)], [({END_S: 0.2}, 0.5)])
    assert rows == [{b" the": 0.5, "end": 0.2}]
    out, rows = toy([(END_P, 7, 8)], [(END_S, 7, 8)], [({0: 0.2}, 0.7)])
    assert rows == [{b" the": 0.2, "end": 0.7}]
    assert out.kind.tolist() == [EXACT]


def test_a_token_that_straddles_the_header():
    # the source's ' the' begins in the header with ' '; the pivot's 'the' does not
    _, rows = toy([(5, 0, 3)], [(0, 0, 3)], [({5: 0.1, 4: 0.2, 11: 0.05, 12: 0.1}, 0.4)], headers=(0, 1))
    # ' th' -> 'th' -> 't'; 'he', 'e' do not begin with the header's blank; ' thez' -> 'the': a longer word
    assert rows == [{b"the": 0.4, b"t": 0.1}]
    # the other way round: the pivot's token holds the blank
    _, rows = toy([(0, 0, 3)], [(13, 0, 3)], [({6: 0.1}, 0.4)], headers=(1, 0))
    assert rows == [{b" the": 0.4, b" ": 0.1}]


@pytest.mark.parametrize("headers", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_an_end_of_turn_is_the_pivots_whatever_header_bytes_the_tokens_hold(headers):
    pivot, source = (names.index(b" the" if h else b"the") for names, h in zip((PIVOT, SOURCE), headers))
    _, rows = toy([(pivot, 0, 3)], [(source, 0, 3)], [({END_S: 0.2}, 0.4)], headers=headers)
    assert rows == [{PIVOT[pivot]: 0.4, "end": 0.2}]
    # not within a source token: what was read there is not the turn's end
    _, rows = toy([(1, 0, 3), (2, 3, 4)], [(0, 0, 4)], [({END_S: 0.2}, 0.4)])
    assert [row.get("end") for row in rows] == [0.2, None]
    _, rows = toy([(1, 0, 3), (2, 3, 4)], [(3, 0, 2), (4, 2, 4)], [({}, 0.6), ({END_S: 0.2}, 0.5)])
    assert rows[1] == {b"e": 1.0}


def test_the_actual_token_takes_the_actual_path():
    # ' then' is one pivot token by itself, but here the pivot wrote ' th','e','n'
    _, rows = toy([(1, 0, 3), (2, 3, 4), (3, 4, 5)], [(1, 0, 5)], [({5: 0.2, 3: 0.1}, 0.5)])
    assert rows[0] == {b" th": 0.7, b" ": 0.1}
    assert rows[1] == {b"e": round(0.5 / 0.7, 6)}
    assert rows[2] == {b"n": 1.0}


def test_a_pivot_token_that_runs_over_several_source_tokens():
    # pivot ' the'; source ' t','he': P = 0.5 * 0.6, and ' then' is another word
    _, rows = toy([(0, 0, 4)], [(3, 0, 2), (4, 2, 4)], [({0: 0.1, 1: 0.2}, 0.5), ({11: 0.3}, 0.6)])
    assert rows == [{b" the": 0.3, b" then": 0.2}]


def test_a_pivot_token_that_ends_inside_a_source_token():
    # pivot ' the n' ends within the source's second token ' n'...: candidates that begin with the covered part count
    source = [(0, 0, 4), (7, 4, 5), (6, 5, 6)]
    out, rows = toy([(13, 0, 6)], source, [({}, 0.5), ({}, 0.4), ({}, 0.3)])
    assert rows == [{b" the n": 0.06}]
    # ' th' | 'e' against ' t' | 'he': the first pivot token covers 'h' of 'he'
    out, rows = toy([(1, 0, 3), (2, 3, 4)], [(3, 0, 2), (4, 2, 4)], [({}, 0.5), ({6: 0.2}, 0.6)])
    assert rows == [{b" th": 0.3}, {b"e": 1.0}]
    assert np.isclose(np.exp(out.log_actual.sum()), 0.5 * 0.6)


def test_holes_have_no_answer():
    # the source was cut: the pivot's second token starts where no source token is, the first runs into the hole
    out, rows = toy([(13, 0, 6), (0, 6, 10)], [(0, 0, 4)], [({}, 0.5)])
    assert rows == [{}, {}]
    assert not out.answered.any()
    # a hole between two pivot tokens inside one source token
    out, rows = toy([(4, 0, 1), (2, 3, 4)], [(0, 0, 4)], [({}, 0.5)])
    assert rows[0] == {b" ": 0.5}
    assert rows[1] == {}


def test_a_hole_after_a_token_that_straddles():
    # ' th' covers ' t' and one byte of 'the'; then the pivot has a hole, so what 'e' follows is not known
    out, rows = toy([(1, 0, 3), (2, 4, 5)], [(3, 0, 2), (13, 2, 5)], [({}, 0.5), ({12: 0.1}, 0.6)])
    assert rows == [{b" th": 0.3}, {}]
    assert out.kind.tolist() == [EXACT, NONE]


@pytest.mark.parametrize(("pivot", "source", "headers"), [(0, 13, (1, 0)), (5, 0, (0, 1)), (0, 0, (1, 1))])
def test_an_end_of_turn_maps_by_role_at_a_start_with_header_bytes(pivot, source, headers):
    _, rows = toy([(pivot, 0, 3)], [(source, 0, 3)], [({END_S: 0.25}, 0.5)], headers=headers)
    assert rows == [{PIVOT[pivot]: 0.5, "end": 0.25}]


def test_outcomes_say_why():
    streams = toy_streams(
        [(0, 0, 4), (6, 4, 5)],
        [(2, 0, 5)],
        [({2: 0.25, 0: 0.3, 1: 0.2, 3: 0.1}, 0.25)],
    )
    at_the, at_y = prefix_outcomes(*streams)
    # the candidates, most likely first: " they" (the actual one), " the", " then", " t"
    assert [(PIVOT[i], why) for i, why in at_the] == [(b" the", ""), (b" the", ""), (b" then", ""), (b" ", "")]
    assert at_y == [
        (PIVOT.index(b"y"), ""),
        (-1, "ends here, or cannot be spelled"),
        *[(-1, "does not begin with the text so far")] * 2,
    ]
    (at_the,) = prefix_outcomes(*toy_streams([(0, 0, 4)], [(0, 0, 4)], [({2: 0.1}, 0.5)]))
    assert at_the == [(-1, "another, longer word")]


def test_the_worked_example():
    failed, tried = doctest.testmod(prefix)
    assert failed == 0
    assert tried > 8


def test_equal_ids_add_up_in_place():
    ids = np.array([[3, 4, 3, -1, 3], [1, 2, -1, -1, 5]])
    probs = np.array([[0.1, 0.2, 0.3, 0.0, 0.1], [0.5, 0.1, 0.0, 0.0, 0.2]])
    add_up_equal_ids(ids, probs)
    assert ids.tolist() == [[3, 4, -1, -1, -1], [1, 2, -1, -1, 5]]
    assert np.allclose(probs, [[0.5, 0.2, 0, 0, 0], [0.5, 0.1, 0, 0, 0.2]])
