"""Which blanks of a token are literal '▁' in the text: the pivot's bytes say it, against every reading there is."""

import random
from itertools import pairwise, product

import numpy as np
import pytest

from fusechat_fuse.alignment.candidates import Stream, Vocabularies, _literal_marks, _reading
from fusechat_fuse.alignment.paths import PathTable

MARK = "▁".encode()


def pivot_of(pieces: list[tuple[int, bytes | None, int]]) -> tuple[Stream, Vocabularies]:
    """A pivot's tokens as (start, bytes, width); its vocabulary has them in this order."""
    starts, spelled, widths = zip(*pieces)
    start = np.array(starts)
    header = np.array([max(len(piece or b"") - width, 0) for piece, width in zip(spelled, widths)])
    stream = Stream(np.arange(len(pieces)), start, start + np.array(widths), header)
    return stream, Vocabularies(list(spelled), [], None, PathTable.of([]), lambda pieces: [])


@pytest.mark.parametrize("blanks", [2, 9, 16, 400])
@pytest.mark.parametrize("seed", range(3))
def test_the_right_reading_whatever_the_number_of_blanks(blanks, seed):
    rng = random.Random(seed)
    text = b"".join(rng.choice([b" ", MARK]) for _ in range(blanks)) + b"x"
    cuts = sorted({0, len(text), *rng.sample(range(len(text)), min(5, len(text)))})
    pieces = [(100 + a, text[a:b], b - a) for a, b in pairwise(cuts)]
    pieces[0] = (97, b"abc" + pieces[0][1], pieces[0][2] + 3)  # begins before the token
    pieces[-1] = (pieces[-1][0], pieces[-1][1] + b"yz", pieces[-1][2] + 2)  # ends after it
    assert _literal_marks(b" " * blanks + b"x", len(text), 100, *pivot_of(pieces)) == text


def test_what_a_pivot_of_the_same_kind_tells():
    # its tokens are blanks too: two of six bytes are marks; two of four may be either way around
    text = b" " + MARK + MARK + b" "
    told = [(0, b" ", 1), (1, b"  ", 6), (7, b" ", 1)]
    assert _literal_marks(b"    ", 8, 0, *pivot_of(told)) == text
    assert _literal_marks(b"    ", 8, 0, *pivot_of([(0, b"  ", 4), (4, b"  ", 4)])) == b"  " + MARK + MARK
    assert _literal_marks(b"    ", 8, 0, *pivot_of([(0, None, 8)])) == b"  " + MARK + MARK  # nothing known
    assert _literal_marks(b"  ", 4, 0, *pivot_of([(0, b"abcd", 4)])) == b" " + MARK  # not its text


@pytest.mark.parametrize("seed", range(40))
def test_reading_against_all_readings(seed):
    rng = random.Random(seed)
    own = bytes(rng.choice(b"   a") for _ in range(rng.randint(1, 8)))
    blank = [(b" ", MARK) if byte == 32 else (bytes([byte]),) for byte in own]
    text = b"".join(rng.choice(forms) for forms in blank)
    known = [byte if rng.random() < 0.4 else None for byte in text]
    if seed % 4 == 0:
        known[rng.randrange(len(known))] = 98
    every = [b"".join(forms) for forms in product(*blank)]
    right = [r for r in every if len(r) == len(known) and all(k in (None, b) for k, b in zip(known, r))]
    assert _reading(own, known) == (right[0] if right else None)
