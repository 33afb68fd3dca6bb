"""The table of mappings is the one place that a mapping is named in."""

import numpy as np
import pytest

from fusechat_fuse.alignment.candidate_outcomes import single_id_outcomes
from fusechat_fuse.alignment.mappings import MAPPINGS, Mapping
from fusechat_fuse.alignment.run import align
from fusechat_fuse.alignment.single_id import single_id_rows
from fusechat_fuse.cli import main
from fusechat_fuse.inspection.run import inspect_path
from fusechat_fuse.store.shards import load_representation
from tests.helpers.alignment_data import rows_for, write


def everything_to_seven(source_bytes, pivot_bytes, by_bytes, counts, workers) -> np.ndarray:
    assert counts.counts.sum() > 0
    return np.full(len(source_bytes), 7, np.int32)


@pytest.fixture
def seven(monkeypatch):
    """A mapping of no use: every source id becomes pivot id 7."""
    mapping = Mapping(
        "seven", "for the test", single_id_rows, single_id_outcomes, everything_to_seven, True, True, renormalised=True
    )
    monkeypatch.setitem(MAPPINGS, "seven", mapping)


@pytest.mark.usefixtures("seven")
def test_a_new_mapping_is_one_entry(tiny_bpe, tiny_unigram, tmp_path):
    pivot = write(tmp_path / "p", tiny_bpe, rows_for(tiny_bpe))
    source = write(tmp_path / "s", tiny_unigram, rows_for(tiny_unigram, seed=1))
    align(pivot.path, source.path, tmp_path / "out", mapping="seven", cache_dir=tmp_path / "cache", num_proc=2)
    assert len(list((tmp_path / "cache" / "vocabulary").glob("seven-*"))) == 1
    by_role = {tiny_bpe.bos_token_id, tiny_bpe.eos_token_id}  # whatever the map says
    for row in load_representation(tmp_path / "out"):
        answered = (row["mapped_mass"] > 0) & (row["start"] > 0)  # a first token may hold header bytes too
        assert set(row["source_ids"][answered].ravel().tolist()) - by_role == {7, -1}
        assert np.allclose(row["source_probs"].sum(1), 1, atol=2e-3)
    assert "seven mapping" in inspect_path(tmp_path / "out")


def test_help_names_every_mapping(capsys):
    assert main(["align", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for mapping in MAPPINGS.values():
        assert f"{mapping.name} ({mapping.summary})" in text
