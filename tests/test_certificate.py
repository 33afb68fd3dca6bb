"""The certificate: what it covers and says (its sums are held by the loops of test_alignment_oracle)."""

import numpy as np

from fusechat_fuse.alignment.candidates import SourceStream, Stream
from fusechat_fuse.alignment.certificate import certificate, kept_mass, stretches, summary_lines, tally
from fusechat_fuse.alignment.correspondence import EXACT, INSIDE, correspond
from fusechat_fuse.alignment.sparse_rows import Mapped
from fusechat_fuse.alignment.streams import Batch


def test_covered_stretches_by_hand():
    def stream(*spans):
        start, end = (np.array(column) for column in zip(*spans))
        return Stream(np.zeros(len(start), int), start, end, np.zeros(len(start), int))

    # [0, 4) both; [4, 6): the pivot has a hole; [6, 9): no answer; [9, 15) against [9, 13): the source was cut
    pivot = stream((0, 2), (2, 4), (4, 5), (6, 9), (9, 15))
    source = stream((0, 4), (4, 6), (6, 9), (9, 11), (11, 13))
    match = correspond(pivot.start, pivot.end, source.start, source.end)
    of_p, of_q, covered = stretches(pivot, source, match, np.array([True, True, True, False, True]))
    assert of_p.tolist() == [0, 0, 1, 2, 3]
    assert of_q.tolist() == [0, 1, 2, 3, 3]
    assert covered.tolist() == [True, False, False, False]
    whole = stream((0, 4), (4, 6), (6, 9), (9, 11), (11, 15))
    match = correspond(pivot.start, pivot.end, whole.start, whole.end)
    assert stretches(pivot, whole, match, np.ones(5, bool))[2].tolist() == [True, False, True, True]


def test_gaps_of_opposite_sign_do_not_cancel_in_the_mean_of_their_sizes():
    # two conversations of two bytes, one token each: the source needs 2 and 4 bits, the aligned rows 4 and 2
    start, end = np.array([0, 10]), np.array([2, 12])
    pivot = Stream(np.array([1, 1]), start, end, np.zeros(2, int))
    source = SourceStream(
        np.array([5, 5]), start, end, np.zeros(2, int), np.log([4.0, 16.0]), np.array([[5, 6]] * 2), np.zeros((2, 2))
    )
    probs = np.array([[1 / 16], [1 / 4]])
    mapped = Mapped(
        np.ones((2, 1), int), probs, np.log(probs[:, 0]), np.ones(2, bool), probs[:, 0], np.full(2, EXACT), np.zeros(2)
    )
    match = correspond(start, end, start, end)
    both = np.ones(2, bool)
    counted = tally(Batch(pivot, source, match, both, np.arange(2), both, predicted=np.array([1, 3])), mapped)
    assert counted["predicted"].tolist() == [1, 3]
    figures = certificate({name: float(values.sum()) for name, values in counted.items()})
    assert abs(figures["gap_bits_per_byte"]) < 1e-12
    assert abs(figures["mean_abs_gap_bits_per_byte"] - 1) < 1e-12
    assert figures["coverage"] == 0.5
    lines = "\n".join(summary_lines({"all": figures | {"gap_bits_per_byte": -1e-7}, "worst": []}))
    assert "gap 0.0000 (mean of its size per conversation 1.0000)" in lines
    assert "-0.0000" not in lines


def test_kept_mass_by_hand():
    # [0, 2) the actual token is not among the kept ones, [2, 4) it is; the pivot has a token inside the second
    start, end = np.array([0, 2]), np.array([2, 4])
    logprobs = np.log([[0.5, 0.25], [0.5, 0.125]])
    source = SourceStream(
        np.array([7, 8]), start, end, np.zeros(2, int), -np.log([0.1, 0.125]), np.array([[1, 2], [1, 8]]), logprobs
    )
    match = correspond(np.array([0, 2, 3]), np.array([2, 3, 4]), start, end)
    mapped = Mapped.empty(3, 1)
    mapped.kind[:] = EXACT, EXACT, INSIDE
    mapped.exact_actual = True
    assert np.allclose(kept_mass(source, match, mapped), [0.85, 0.625, 1])
    mapped.exact_actual = False
    assert np.allclose(kept_mass(source, match, mapped), [0.75, 0.625, 1])
