"""`align` from directory to directory: joining, identity, resuming, refusing; and each edge rule on its own."""

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

from fusechat_fuse.alignment import run as alignment
from fusechat_fuse.alignment.candidates import Stream, Vocabularies
from fusechat_fuse.alignment.certificate import CoverageError, stretches, summary_lines
from fusechat_fuse.alignment.correspondence import EXACT, INSIDE, NONE, correspond, joined_bytes, safe_starts
from fusechat_fuse.alignment.paths import PathTable
from fusechat_fuse.alignment.prefix import prefix_rows
from fusechat_fuse.alignment.run import align
from fusechat_fuse.alignment.sparse_rows import add_up_equal_ids
from fusechat_fuse.alignment.streams import align_batch, make_batch
from fusechat_fuse.alignment.tokenizer_pair import Pair
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.shards import load_representation
from tests.helpers.alignment_data import HEADERS, TEXTS, end_of_turn, make_row, write_representation

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "cache"))


def rows_for(tokenizer, seed=0, K=5, names=None, repeat=1, **extra):
    rows = []
    for n in range(len(TEXTS) * repeat):
        text = TEXTS[n % len(TEXTS)]
        name = names[n] if names else f"c{n}"
        row = make_row(
            tokenizer, name, [text], header=HEADERS["gpt4"], end_of_turn=end_of_turn(tokenizer), K=K, seed=seed
        )
        rows.append(row | {key: values[n % len(values)] for key, values in extra.items()})
    return rows


def write(path, tokenizer, rows, **options):
    return write_representation(path, tokenizer, rows, end_of_turn=end_of_turn(tokenizer), **options)


@pytest.fixture
def two(tmp_path, tiny_bpe, tiny_unigram):
    """A pivot and a source representation of the same ten conversations."""
    return (
        write(tmp_path / "pivot", tiny_bpe, rows_for(tiny_bpe)),
        write(tmp_path / "source", tiny_unigram, rows_for(tiny_unigram, seed=1)),
    )


def files_of(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


@pytest.mark.parametrize("mapping", ["exact", "min_edit", "statistics", "prefix"])
def test_align_writes_the_contract(mapping, two, tmp_path):
    manifest = align(two[0].path, two[1].path, tmp_path / "out", mapping=mapping)
    aligned = load_representation(tmp_path / "out")
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
    assert whole["predicted_tokens"] == two[0].num_predicted.sum()
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
            assert np.allclose(row["source_probs"][:, :K], probs / probs.sum(1, keepdims=True), rtol=6e-3)
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
        ({"counts": "nowhere"}, "expected mapping statistics beside it, got 'prefix'"),
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
    with pytest.raises(InputError, match="mapping = 'exact' there and 'prefix' here"):
        align(two[0].path, two[1].path, tmp_path / "out", mapping="prefix")


def test_coverage_below_the_limit_stops_the_run(two, tmp_path):
    with pytest.raises(CoverageError, match="expected at least 99\\.00%"):
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


def test_processes_and_shards_do_not_change_the_result(two, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "SHARD", 3)
    for mapping in ("prefix", "statistics"):
        align(two[0].path, two[1].path, tmp_path / f"{mapping}-1", mapping=mapping)
        align(two[0].path, two[1].path, tmp_path / f"{mapping}-2", mapping=mapping, num_proc=2)
        assert files_of(tmp_path / f"{mapping}-1") == files_of(tmp_path / f"{mapping}-2")


def test_damaged_shard_is_made_again(two, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(alignment, "SHARD", 3)
    align(two[0].path, two[1].path, tmp_path / "out", mapping="prefix")
    whole = files_of(tmp_path / "out")
    shard = tmp_path / "out" / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100] + b"x" * 100)
    with caplog.at_level(logging.WARNING):
        align(two[0].path, two[1].path, tmp_path / "out", mapping="prefix")
    assert "shard-00001.arrow is damaged" in caplog.text
    assert files_of(tmp_path / "out") == whole


def test_a_killed_run_goes_on_and_ends_the_same(tiny_bpe, tiny_unigram, tmp_path):
    write(tmp_path / "p", tiny_bpe, rows_for(tiny_bpe, repeat=6))
    write(tmp_path / "s", tiny_unigram, rows_for(tiny_unigram, seed=1, repeat=6))
    program = (
        "import sys, time\n"
        "from fusechat_fuse.alignment import run as alignment\n"
        "alignment.SHARD = 2\n"
        "whole = alignment.Job.aligned\n"
        "def slow(self, shard):\n"
        "    time.sleep(float(sys.argv[2]))\n"
        "    return whole(self, shard)\n"
        "alignment.Job.aligned = slow\n"
        "alignment.align(*sys.argv[3:5], sys.argv[1], mapping='statistics')\n"
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
    monkeypatch.setattr("fusechat_fuse.alignment.tokenizer_pair.min_edit_map", None)  # must not be needed again
    align(two[0].path, two[1].path, tmp_path / "b", mapping="min_edit")
    kept = list((tmp_path / "cache" / "vocabulary").glob("min_edit-*.safetensors"))
    assert len(kept) == 1
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(TypeError):
        align(two[0].path, two[1].path, tmp_path / "c", mapping="min_edit")


def test_an_interrupted_store_needs_no_second_pass_for_counts(two, tmp_path, monkeypatch):
    align(two[0].path, two[1].path, tmp_path / "out", mapping="statistics")
    (tmp_path / "out" / "manifest.json").unlink()
    monkeypatch.setattr(alignment.Job, "counts", None)
    align(two[0].path, two[1].path, tmp_path / "out", mapping="statistics")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["kind"] == "aligned"


# ---- positions


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


# ---- the edge rules, each on a hand-made pair: pivot ids 0.., source ids 0.., five bytes or so of text

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


def toy(pivot, source, tables, headers=(0, 0)):
    """pivot, source: [(id, start, end)]; tables: per source token ({id: P}, P(actual))."""
    table = PathTable([[END_P] if piece is None else spell([piece])[0] for piece in SOURCE])
    vocab = Vocabularies(PIVOT, SOURCE, None, table, spell)

    def stream(tokens, header, **more):
        ids, start, end = (np.array(column, np.int64) for column in zip(*tokens))
        first = np.zeros(len(ids), np.int64)
        first[0] = header
        return Stream(ids, start, end, first, **more)

    K = max(len(others) for others, _ in tables)
    ids, logs = np.full((len(source), K), -1), np.full((len(source), K), -np.inf)
    for n, (others, _) in enumerate(tables):
        for k, (i, p) in enumerate(others.items()):
            ids[n, k], logs[n, k] = i, np.log(p)
    ce = -np.log([own for _, own in tables])
    p = stream(pivot, headers[0])
    s = stream(source, headers[1], ce=ce, topk_ids=ids, topk_logprobs=logs)
    out = prefix_rows(p, s, correspond(p.start, p.end, s.start, s.end), vocab)
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


def test_rule_1_and_2_a_literal_mark_is_three_bytes_of_text(openchat, qwen, tmp_path):
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


def test_rule_5_same_bytes_in_two_ids_add_up():
    _, rows = toy([(4, 0, 1)], [(7, 0, 1)], [({8: 0.2, 9: 0.1}, 0.5)])
    assert rows == [{b"A": 0.3, b" ": 0.5}]


def test_rule_5_but_not_on_the_actual_token():
    _, rows = toy([(9, 0, 1)], [(8, 0, 1)], [({9: 0.3}, 0.5)])
    assert rows == [{b"A": 0.5}]


def test_rule_6_special_tokens_only_by_role():
    _, rows = toy([(0, 0, 4)], [(0, 0, 4)], [({END_S: 0.2}, 0.5)])
    assert rows == [{b" the": 0.5, "end": 0.2}]
    out, rows = toy([(END_P, 7, 8)], [(END_S, 7, 8)], [({0: 0.2}, 0.7)])
    assert rows == [{b" the": 0.2, "end": 0.7}]
    assert out.kind.tolist() == [EXACT]


def test_rule_7_a_token_that_straddles_the_header():
    # the source's ' the' begins in the header with ' '; the pivot's 'the' does not
    _, rows = toy([(5, 0, 3)], [(0, 0, 3)], [({5: 0.1, 4: 0.2, 11: 0.05, 12: 0.1}, 0.4)], headers=(0, 1))
    # ' th' -> 'th' -> 't'; 'he', 'e' do not begin with the header's blank; ' thez' -> 'the': a longer word
    assert rows == [{b"the": 0.4, b"t": 0.1}]
    # the other way round: the pivot's token holds the blank
    _, rows = toy([(0, 0, 3)], [(13, 0, 3)], [({6: 0.1}, 0.4)], headers=(1, 0))
    assert rows == [{b" the": 0.4, b" ": 0.1}]


def test_rule_8_the_actual_token_takes_the_actual_path():
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


def test_rule_9_holes_have_no_answer():
    # the source was cut: the pivot's second token starts where no source token is, the first runs into the hole
    out, rows = toy([(13, 0, 6), (0, 6, 10)], [(0, 0, 4)], [({}, 0.5)])
    assert rows == [{}, {}]
    assert not out.answered.any()
    # a hole between two pivot tokens inside one source token
    out, rows = toy([(4, 0, 1), (2, 3, 4)], [(0, 0, 4)], [({}, 0.5)])
    assert rows[0] == {b" ": 0.5}
    assert rows[1] == {}


def test_rule_9_a_hole_after_a_token_that_straddles():
    # ' th' covers ' t' and one byte of 'the'; then the pivot has a hole, so what 'e' follows is not known
    out, rows = toy([(1, 0, 3), (2, 4, 5)], [(3, 0, 2), (13, 2, 5)], [({}, 0.5), ({12: 0.1}, 0.6)])
    assert rows == [{b" th": 0.3}, {}]
    assert out.kind.tolist() == [EXACT, NONE]


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


def test_equal_ids_add_up_in_place():
    ids = np.array([[3, 4, 3, -1, 3], [1, 2, -1, -1, 5]])
    probs = np.array([[0.1, 0.2, 0.3, 0.0, 0.1], [0.5, 0.1, 0.0, 0.0, 0.2]])
    add_up_equal_ids(ids, probs)
    assert ids.tolist() == [[3, 4, -1, -1, -1], [1, 2, -1, -1, 5]]
    assert np.allclose(probs, [[0.5, 0.2, 0, 0, 0], [0.5, 0.1, 0, 0, 0.2]])


def test_mass_in_is_mass_out_plus_unmapped(two, tmp_path):
    pair = Pair.load(*two, tmp_path / "cache")
    for mapping in ("exact", "prefix"):
        vocab = pair.vocabularies(mapping)
        for p, s in zip(two[0], two[1]):
            batch = make_batch([p], [s], pair)
            match, mapped, _ = align_batch(batch, pair, vocab, mapping, False)
            source = batch.source
            for n in np.flatnonzero(match.kind == EXACT):
                q = match.source[n]
                given = np.exp(source.topk_logprobs[q].astype(np.float64))
                if mapping == "exact":
                    lost = given[vocab.to_pivot[source.topk_ids[q]] < 0].sum()
                    own = (source.header[q] > 0) or (batch.pivot.header[n] > 0)
                    assert own or mapped.mass[n] + lost == pytest.approx(given.sum(), rel=1e-6)
                else:
                    actual = np.exp(-np.float64(source.ce[q]))
                    kept = given[source.topk_ids[q] != source.ids[q]].sum() + actual
                    assert mapped.mass[n] <= kept * (1 + 1e-6)
