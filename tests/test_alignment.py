"""`align` from directory to directory: joining, identity, resuming, refusing."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fusechat_fuse.alignment import job
from fusechat_fuse.alignment.certificate import CoverageError, summary_lines
from fusechat_fuse.alignment.correspondence import EXACT
from fusechat_fuse.alignment.mappings import MAPPINGS
from fusechat_fuse.alignment.run import align
from fusechat_fuse.alignment.streams import align_batch, make_batch
from fusechat_fuse.alignment.tokenizer_pair import TokenizerPair
from fusechat_fuse.errors import InputError
from fusechat_fuse.store import shard_writer
from fusechat_fuse.store.shards import load_representation
from tests.helpers.alignment_data import end_of_turn, files_of, make_row, rows_for, write

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def two(tmp_path, tiny_bpe, tiny_unigram):
    """A pivot and a source representation of the same ten conversations."""
    return (
        write(tmp_path / "pivot", tiny_bpe, rows_for(tiny_bpe)),
        write(tmp_path / "source", tiny_unigram, rows_for(tiny_unigram, seed=1)),
    )


@pytest.mark.parametrize("mapping", ["exact", "min_edit", "statistics", "prefix"])
def test_align_writes_the_contract(mapping, two, tmp_path):
    manifest = align(two[0].path, two[1].path, tmp_path / "out", mapping=mapping)
    aligned = load_representation(tmp_path / "out")
    assert max(row["source_probs"].sum(1, dtype=np.float64).max() for row in aligned) <= 1
    assert max(row["mapped_mass"].max() for row in aligned) <= 1
    assert aligned.manifest == manifest
    assert manifest["kind"] == "aligned"
    assert aligned.ids == two[0].ids
    for pivot, source, row in zip(two[0], two[1], aligned):
        P = len(pivot["predicted"])
        for name in ("input_ids", "predicted", "message", "start", "end", "topk_ids", "topk_logprobs", "ce"):
            assert (row[name] == pivot[name]).all()
        assert row["source_ids"].dtype == np.int32
        assert row["source_probs"].dtype == np.float32
        assert row["source_ids"].shape == row["source_probs"].shape
        assert row["source_ids"].shape[1] <= 6
        assert row["source_token_ce"].shape == row["mapped_mass"].shape == (P,)
        assert row["source_ce"] == pytest.approx(source["ce"].mean(), rel=1e-6)
        assert row["source_bytes"] == (source["end"] - source["start"]).sum()
        assert row["source_tokens"] == len(source["predicted"])
        assert not np.isnan(row["source_probs"]).any()
        assert (row["source_probs"] >= 0).all()
        assert ((row["source_ids"] >= 0) == (row["source_probs"] > 0)).all()
        mass = row["source_probs"].sum(1)
        if mapping == "prefix":
            assert np.allclose(mass, row["mapped_mass"], atol=2e-3)
            own = np.where(row["source_ids"] == row["input_ids"][row["predicted"]][:, None], row["source_probs"], 0)
            assert np.allclose(own.sum(1), np.exp(-row["source_token_ce"]), rtol=2e-2)
        else:
            assert np.allclose(mass, 1, atol=2e-3)
            hot = row["mapped_mass"] == 0
            assert (row["source_ids"][hot, 0] == row["input_ids"][row["predicted"]][hot]).all()
            assert (row["source_ids"][hot, 1:] == -1).all()
    whole = manifest["certificate"]["all"]
    assert whole["predicted_tokens"] == two[0].manifest["counts"]["predicted_tokens"]
    if mapping == "prefix":
        assert whole["coverage"] == 1
        assert abs(whole["gap_bits_per_byte"]) < 1e-6
    else:
        assert 0.5 < whole["coverage"] < 1
    assert any("coverage" in line for line in summary_lines(manifest["certificate"]))


@pytest.mark.parametrize("mapping", ["statistics", "prefix"])
def test_equal_tokenizers_are_mapped_by_identity(mapping, tiny_bpe, tmp_path):
    pivot = write(tmp_path / "p", tiny_bpe, rows_for(tiny_bpe))
    source = write(tmp_path / "s", tiny_bpe, rows_for(tiny_bpe, seed=1))
    manifest = align(pivot.path, source.path, tmp_path / "out", mapping=mapping)
    assert manifest["vocabulary"] == "identity"
    assert manifest["certificate"]["all"]["coverage"] == 1
    assert not (tmp_path / "out" / "counts.safetensors").exists()  # no pass for counts
    for theirs, row in zip(source, load_representation(tmp_path / "out")):
        K = theirs["topk_ids"].shape[1]
        assert (row["source_ids"][:, :K] == theirs["topk_ids"]).all()
        probs = np.exp(theirs["topk_logprobs"].astype(np.float64))
        if mapping == "statistics":
            assert np.allclose(row["source_probs"][:, :K], probs / probs.sum(1, keepdims=True), rtol=8e-3)
        else:
            assert np.allclose(row["source_probs"][:, :K], probs, rtol=6e-3)
            actual = theirs["input_ids"][theirs["predicted"]]
            extra = ~(theirs["topk_ids"] == actual[:, None]).any(1)
            assert (row["source_ids"][extra, K] == actual[extra]).all()
            assert np.allclose(row["source_token_ce"], theirs["ce"], rtol=1e-6)


def test_padded_embeddings_give_no_invalid_id(tiny_bpe, tiny_unigram, tmp_path):
    rows = rows_for(tiny_unigram, seed=1)
    for row in rows:
        row["topk_ids"][:, -1] = len(tiny_unigram) + 7  # a row of the embedding that is no token
    pivot = write(tmp_path / "p", tiny_bpe, rows_for(tiny_bpe))
    source = write(tmp_path / "s", tiny_unigram, rows, vocab_size=len(tiny_unigram) + 64)
    for mapping in ("prefix", "exact"):
        align(pivot.path, source.path, tmp_path / mapping, mapping=mapping)
        for row in load_representation(tmp_path / mapping):
            assert row["source_ids"].max() < len(tiny_bpe)
            assert (row["mapped_mass"] <= 1.002).all()


@pytest.mark.parametrize("mapping", ["exact", "prefix"])
def test_a_token_of_no_bytes_has_no_answer(mapping, two, tiny_bpe, tmp_path):
    rows = rows_for(tiny_bpe)
    rows[0]["end"][3] = rows[0]["start"][3]
    pivot = write(tmp_path / "p", tiny_bpe, rows)
    align(two[0].path, two[1].path, tmp_path / "whole", mapping=mapping)
    align(pivot.path, two[1].path, tmp_path / "out", mapping=mapping)
    row, whole = load_representation(tmp_path / "out")[0], load_representation(tmp_path / "whole")[0]
    actual = row["input_ids"][row["predicted"][3]]
    assert (row["source_ids"][3, 1:] == -1).all()
    assert (row["source_ids"][3, 0], row["source_probs"][3, 0]) == ((actual, 1) if mapping == "exact" else (-1, 0))
    assert (row["source_token_ce"][3], row["mapped_mass"][3]) == (np.inf, 0)
    figures = [load_representation(tmp_path / name).manifest["certificate"]["all"] for name in ("out", "whole")]
    assert figures[0]["predicted_tokens"] == figures[1]["predicted_tokens"]  # it counts, as unanswered
    assert figures[0]["coverage"] < figures[1]["coverage"]
    assert (row["source_probs"][-5:] == whole["source_probs"][-5:]).all()  # the others stay in their places
    assert (row["mapped_mass"][-5:] == whole["mapped_mass"][-5:]).all()


def test_conversations_are_joined_by_id_and_content(tiny_bpe, tiny_unigram, tmp_path, caplog):
    theirs = rows_for(tiny_unigram, seed=1)
    theirs[3]["content_hash"] = "0123456789abcdef"  # same id, other content
    theirs[4]["id"] = "renamed"
    pivot = write(tmp_path / "p", tiny_bpe, rows_for(tiny_bpe))
    source = write(tmp_path / "s", tiny_unigram, theirs[::-1])
    with caplog.at_level(logging.WARNING):
        manifest = align(pivot.path, source.path, tmp_path / "out", mapping="prefix")
    assert "8 conversations joined" in caplog.text
    assert manifest["join"] == {
        "joined": 8,
        "only_pivot": {"count": 1, "ids": ["c4"]},
        "only_source": {"count": 1, "ids": ["renamed"]},
        "content_differs": {"count": 1, "ids": ["c3"]},
    }
    aligned = load_representation(tmp_path / "out")
    assert aligned.ids == ["c0", "c1", "c2", "c5", "c6", "c7", "c8", "c9"]
    straight = write(tmp_path / "s2", tiny_unigram, rows_for(tiny_unigram, seed=1))
    align(pivot.path, straight.path, tmp_path / "out2", mapping="prefix")
    other = {row["id"]: row for row in load_representation(tmp_path / "out2")}
    for row in aligned:
        assert (row["source_probs"] == other[row["id"]]["source_probs"]).all()


def test_nothing_in_common_is_refused(two, tiny_unigram, tmp_path):
    rows = rows_for(tiny_unigram, names=[f"z{n}" for n in range(10)])
    other = write(tmp_path / "other", tiny_unigram, rows)
    with pytest.raises(InputError, match="no id in common"):
        align(two[0].path, other.path, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "dtw"}, "expected one of exact, min_edit, statistics, prefix, got 'dtw'"),
        ({"num_proc": 0}, "num_proc"),
        ({"fail_under_coverage": 95}, "share from 0 to 1, got 95"),
        ({"mapping": "statistics", "counts": "nowhere"}, "counts"),
        ({"counts": "nowhere"}, "expected mapping statistics with it, got 'prefix'"),
    ],
)
def test_bad_options(options, message, two, tmp_path):
    with pytest.raises(InputError, match=message):
        align(two[0].path, two[1].path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_aligned_data_is_no_representation(two, tmp_path):
    align(two[0].path, two[1].path, tmp_path / "out", mapping="exact")
    with pytest.raises(InputError, match="expected what `represent` wrote, got aligned"):
        align(two[0].path, tmp_path / "out", tmp_path / "out2")


def test_another_run_has_another_directory(two, tmp_path):
    align(two[0].path, two[1].path, tmp_path / "out", mapping="exact")
    with pytest.raises(InputError, match="mapping = 'exact' there and 'prefix' here"):
        align(two[0].path, two[1].path, tmp_path / "out", mapping="prefix")


def test_coverage_below_the_limit_stops_the_run(two, tmp_path):
    with pytest.raises(CoverageError, match="expected an answer for at least 99\\.00%"):
        align(two[0].path, two[1].path, tmp_path / "out", mapping="exact", fail_under_coverage=0.99)
    with pytest.raises(InputError, match="manifest"):
        load_representation(tmp_path / "out")
    align(two[0].path, two[1].path, tmp_path / "out2", mapping="prefix", fail_under_coverage=0.99)


def test_safe_only_answers_at_safe_starts(two, tmp_path):
    every = align(two[0].path, two[1].path, tmp_path / "a", mapping="prefix")["certificate"]["all"]
    safe = align(two[0].path, two[1].path, tmp_path / "b", mapping="prefix", safe_only=True)["certificate"]["all"]
    assert safe["coverage"] == pytest.approx(every["coverage"] * every["safe"])
    assert safe["safe"] == 1
    assert 0 < safe["coverage"] < 1
    for row in load_representation(tmp_path / "b"):
        none = row["mapped_mass"] == 0
        assert (row["source_ids"][none] == -1).all()
        assert np.isinf(row["source_token_ce"][none]).all()


def test_counts_of_an_earlier_corpus(two, tiny_bpe, tiny_unigram, tmp_path):
    first = align(two[0].path, two[1].path, tmp_path / "a", mapping="statistics")
    again = align(two[0].path, two[1].path, tmp_path / "b", mapping="statistics", counts=tmp_path / "a")
    assert [shard["sha256"] for shard in first["shards"]] == [shard["sha256"] for shard in again["shards"]]
    assert not (tmp_path / "b" / "counts.safetensors").exists()
    with pytest.raises(InputError, match="another pivot tokenizer"):
        align(two[1].path, two[0].path, tmp_path / "c", mapping="statistics", counts=tmp_path / "a")


def test_slices_and_worst_conversations(tiny_bpe, tiny_unigram, tmp_path):
    slices = {"slice": ["prose", "code"]}
    pivot = write(tmp_path / "p", tiny_bpe, rows_for(tiny_bpe, repeat=2, **slices))
    source = write(tmp_path / "s", tiny_unigram, rows_for(tiny_unigram, seed=1, repeat=2, **slices))
    figures = align(pivot.path, source.path, tmp_path / "out", mapping="statistics")["certificate"]
    assert set(figures["slices"]) == {"prose", "code"}
    assert sum(p["predicted_tokens"] for p in figures["slices"].values()) == figures["all"]["predicted_tokens"]
    worst = [abs(row["gap_bits_per_byte"]) for row in figures["worst"]]
    assert len(worst) == 10
    assert worst == sorted(worst, reverse=True)
    lines = "\n".join(summary_lines(figures))
    assert "slice code" in lines
    assert figures["worst"][0]["id"] in lines


@pytest.mark.parametrize("mapping", ["prefix", "statistics"])
def test_processes_do_not_change_a_byte(mapping, two, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "ROWS_PER_SHARD", 3)
    align(two[0].path, two[1].path, tmp_path / "1", mapping=mapping)
    align(two[0].path, two[1].path, tmp_path / "2", mapping=mapping, num_proc=2)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


@pytest.mark.parametrize("mapping", ["prefix", "statistics"])
def test_shards_and_batches_do_not_change_the_rows(mapping, two, tmp_path, monkeypatch):
    align(two[0].path, two[1].path, tmp_path / "whole", mapping=mapping)
    monkeypatch.setattr(shard_writer, "ROWS_PER_SHARD", 3)
    monkeypatch.setattr(job, "_BATCH_TOKENS", 1)
    align(two[0].path, two[1].path, tmp_path / "apart", mapping=mapping)
    whole, apart = load_representation(tmp_path / "whole"), load_representation(tmp_path / "apart")
    assert (len(whole.manifest["shards"]), len(apart.manifest["shards"])) == (1, 4)
    for row, other in zip(whole, apart, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert np.array_equal(row[name], other[name]), name
    figures = (part.manifest["certificate"]["all"] for part in (whole, apart))
    assert next(figures) == pytest.approx(next(figures))


def test_damaged_shard_is_made_again(two, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shard_writer, "ROWS_PER_SHARD", 3)
    align(two[0].path, two[1].path, tmp_path / "out", mapping="prefix")
    whole = files_of(tmp_path / "out")
    shard = tmp_path / "out" / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100] + b"x" * 100)
    with caplog.at_level(logging.WARNING):
        align(two[0].path, two[1].path, tmp_path / "out", mapping="prefix")
    assert "shard-00001.arrow is damaged" in caplog.text
    assert files_of(tmp_path / "out") == whole


@pytest.mark.parametrize("role", ["pivot", "source"])
def test_one_flipped_bit_in_what_is_aligned_is_refused(role, two, tmp_path):
    shard = tmp_path / role / "shard-00000.arrow"
    data = bytearray(shard.read_bytes())
    for at in np.random.default_rng(0).integers(0, len(data), 20):
        data[at] ^= 4
        shard.write_bytes(data)
        os.utime(shard, ns=(0, int(at)))  # the clock of a file may be coarser than this loop
        with pytest.raises(InputError, match=rf"{role}/shard-00000.arrow: expected the file the manifest lists"):
            align(two[0].path, two[1].path, tmp_path / "out", mapping="prefix")
        data[at] ^= 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("topk_ids", 999_999, "topk_ids of conversation 'c0' for .*source: expected ids below .*, got 999999"),
        ("input_ids", 999_999, "input_ids of conversation 'c0' for .*source: expected ids below"),
        ("ce", np.nan, "ce of conversation 'c0' for .*source: expected finite numbers"),
        ("ce", np.inf, "ce of conversation 'c0' for .*source: expected finite numbers"),
        ("topk_logprobs", np.nan, "topk_logprobs of conversation 'c0' for .*source: expected finite numbers"),
    ],
)
def test_rows_that_cannot_be_are_refused(column, value, message, tiny_bpe, tiny_unigram, tmp_path):
    rows = rows_for(tiny_unigram, seed=1)
    rows[0][column][-1] = value
    pivot, source = (
        write(tmp_path / "pivot", tiny_bpe, rows_for(tiny_bpe)),
        write(tmp_path / "source", tiny_unigram, rows),
    )
    with pytest.raises(InputError, match=message):
        align(pivot.path, source.path, tmp_path / "out", mapping="prefix")


@pytest.mark.parametrize("role", ["end_of_turn_id", "bos_id"])
def test_a_role_beyond_the_vocabulary_is_refused(role, two, tmp_path):
    file = two[1].path / "manifest.json"
    manifest = json.loads(file.read_bytes())
    manifest["tokenizer"][role] = 1_000_000
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"{role} for .*source: expected an id below .*, got 1000000"):
        align(two[0].path, two[1].path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_pivot_is_no_source_of_itself(two, tmp_path):
    shutil.copytree(two[0].path, tmp_path / "copy")
    for path in (two[0].path, tmp_path / "copy"):
        with pytest.raises(InputError, match="expected another model's, got the pivot's own"):
            align(two[0].path, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cached_map_serves_only_what_it_was_built_from(two, tmp_path):
    """Manifests that name the same tokenizers, and vocabularies that differ in one token."""
    pair, other = (TokenizerPair(*two, tmp_path / "cache") for _ in range(2))
    changed = next(i for i, piece in enumerate(other.source.bytes) if piece and len(piece) > 2 and piece.isalpha())
    own = other.source.bytes[changed]
    other.source.bytes[changed] = own[::-1]
    spelled = other.vocabularies(MAPPINGS["prefix"]).table.path(changed)
    assert b"".join(pair.pivot.bytes[i] for i in spelled) == own[::-1]
    spelled = pair.vocabularies(MAPPINGS["prefix"]).table.path(changed)
    assert b"".join(pair.pivot.bytes[i] for i in spelled) == own


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(tiny_bpe, tiny_unigram, tmp_path):
    write(tmp_path / "p", tiny_bpe, rows_for(tiny_bpe, repeat=6))
    write(tmp_path / "s", tiny_unigram, rows_for(tiny_unigram, seed=1, repeat=6))
    program = (
        "import sys, time\n"
        "from fusechat_fuse.alignment import job\n"
        "from fusechat_fuse.alignment.run import align\n"
        "from fusechat_fuse.store import shard_writer\n"
        "shard_writer.ROWS_PER_SHARD = 2\n"
        "whole = job.Job.write\n"
        "def slow(self, writer, shard):\n"
        "    time.sleep(float(sys.argv[2]))\n"
        "    return whole(self, writer, shard)\n"
        "job.Job.write = slow\n"
        "align(*sys.argv[3:5], sys.argv[1], mapping='statistics')\n"
    )

    def start(out, pause):
        command = [sys.executable, "-c", program, str(out), str(pause), str(tmp_path / "p"), str(tmp_path / "s")]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)

    killed = start(tmp_path / "killed", 0.3)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "shard-00002.json").exists():
        assert time.monotonic() < deadline, killed.stderr.read().decode()
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    kept = {f: (tmp_path / "killed" / f).stat().st_mtime_ns for f in ("shard-00000.arrow", "shard-00001.arrow")}
    assert not (tmp_path / "killed" / "manifest.json").exists()
    for out, pause in (("killed", 0), ("straight", 0)):
        run = start(tmp_path / out, pause)
        assert run.wait(timeout=60) == 0, run.stderr.read().decode()
        run.stderr.close()
    assert {f: (tmp_path / "killed" / f).stat().st_mtime_ns for f in kept} == kept  # not made twice
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "straight")


def test_min_edit_map_is_kept_on_disk(two, tmp_path, monkeypatch):
    align(two[0].path, two[1].path, tmp_path / "a", mapping="min_edit")
    monkeypatch.setattr("fusechat_fuse.alignment.mappings.min_edit_map", None)  # must not be needed again
    align(two[0].path, two[1].path, tmp_path / "b", mapping="min_edit")
    kept = list((tmp_path / "cache" / "vocabulary").glob("min_edit-*.safetensors"))
    assert len(kept) == 1
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(TypeError):
        align(two[0].path, two[1].path, tmp_path / "c", mapping="min_edit")


def test_an_interrupted_store_needs_no_second_pass_for_counts(two, tmp_path, monkeypatch, caplog):
    align(two[0].path, two[1].path, tmp_path / "out", mapping="statistics")
    (tmp_path / "out" / "manifest.json").unlink()
    monkeypatch.setattr(job.Job, "counts", None)
    with caplog.at_level(logging.INFO):
        align(two[0].path, two[1].path, tmp_path / "out", mapping="statistics")
        assert "1 of 1 shards there, going on." in caplog.text
        align(two[0].path, two[1].path, tmp_path / "out", mapping="statistics")
        assert "holds this very run, finished: nothing to compute." in caplog.text
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["kind"] == "aligned"


def test_a_literal_mark_is_three_bytes_of_text(openchat, qwen, tmp_path):
    # both spell 'a ▁ b'; openchat's token '▁▁' holds a blank and a literal mark
    text = ["a ▁ b▁▁c"]
    made = [
        make_row(t, "x", text, header="", end_of_turn=end_of_turn(t), K=4, seed=n)
        for n, t in enumerate((openchat, qwen))
    ]
    opened = [write(tmp_path / t, k, [row]) for t, k, row in zip(("p", "s"), (openchat, qwen), made)]
    figures = align(opened[0].path, opened[1].path, tmp_path / "out", mapping="prefix")["certificate"]["all"]
    assert figures["coverage"] == 1
    assert figures["covered_bytes"] == len(text[0].encode()) + 1
    assert abs(figures["gap_bits_per_byte"]) < 1e-9


def test_mass_in_is_mass_out_plus_unmapped(two, tmp_path):
    pair = TokenizerPair(*two, tmp_path / "cache")
    for mapping in (MAPPINGS["exact"], MAPPINGS["prefix"]):
        vocab = pair.vocabularies(mapping)
        for p, s in zip(two[0], two[1]):
            batch = make_batch([p], [s], pair)
            mapped = align_batch(batch, pair, vocab, mapping, False)
            source, match = batch.source, batch.match
            for n in np.flatnonzero(match.kind == EXACT):
                q = match.source[n]
                given = np.exp(source.topk_logprobs[q].astype(np.float64))
                if mapping.renormalised:
                    lost = given[vocab.to_pivot[source.topk_ids[q]] < 0].sum()
                    own = (source.header[q] > 0) or (batch.pivot.header[n] > 0)
                    assert own or mapped.mass[n] + lost == pytest.approx(given.sum(), rel=1e-6)
                else:
                    actual = np.exp(-np.float64(source.ce[q]))
                    kept = given[source.topk_ids[q] != source.ids[q]].sum() + actual
                    assert mapped.mass[n] <= kept * (1 + 1e-6)
