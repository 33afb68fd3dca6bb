"""The certificate: which stretches it covers (its figures are held by the loops of test_alignment_oracle)."""

import numpy as np

from fusechat_fuse.alignment.candidates import Stream
from fusechat_fuse.alignment.certificate import stretches
from fusechat_fuse.alignment.correspondence import correspond


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
