"""The store: what goes in comes out, whole shards only, one run per directory, same bytes every time."""

import json
import logging
import pickle
import re

import numpy as np
import pytest

from fusechat_fuse.errors import InputError
from fusechat_fuse.store import shard_writer
from fusechat_fuse.store.claim import check_claim
from fusechat_fuse.store.fields import decode_ids, encode_ids
from fusechat_fuse.store.files import file_sha256
from fusechat_fuse.store.rows import _decode_source, _encode_source, decode_row
from fusechat_fuse.store.shard_writer import ShardWriter
from fusechat_fuse.store.shards import _sha256_once, load_representation
from fusechat_fuse.store.tokenizers import copy_tokenizer, read_tokenizer, save_tokenizer


def make_row(rng, name, T=40, K=10, vocabulary=32002, aligned=False, turns=2):
    """A row with two assistant turns, a straddling first token, a hole in the spans and an end of turn each."""
    predicted, message, start, end = [], [], [], []
    at = 3
    for turn in range(turns):
        widths = rng.integers(0, 9, T // turns - 3)
        position = 0
        for n, width in enumerate(widths):
            predicted.append(at)
            message.append(2 * turn + 1)
            position += 2 if n == 4 else 0
            start.append(position)
            position += width
            end.append(position)
            at += 1
        at += 3
    P = len(predicted)
    logprobs = -np.sort(rng.exponential(2.0, (P, K)).cumsum(1), axis=1)
    row = {
        "id": name,
        "content_hash": f"{len(name):016x}",
        "slice": "code" if len(name) % 2 else None,
        "input_ids": rng.integers(0, vocabulary, at + 2).astype(np.int32),
        "predicted": np.array(predicted, np.int32),
        "message": np.array(message, np.int16),
        "start": np.array(start, np.int32),
        "end": np.array(end, np.int32),
        "topk_ids": rng.integers(0, vocabulary, (P, K)).astype(np.int32),
        "topk_logprobs": logprobs.astype(np.float16),
        "ce": rng.exponential(2.0, P).astype(np.float32),
    }
    if aligned:
        kept = rng.random((P, K + 1)) < 0.6
        kept[0] = False
        kept[:, ::-1].sort(axis=1)
        row["source_ids"] = np.where(kept, rng.integers(0, vocabulary, (P, K + 1)), -1).astype(np.int32)
        row["source_probs"] = np.where(kept, rng.random((P, K + 1)) ** 8 / 11, 0).astype(np.float32)
        row["source_token_ce"] = rng.exponential(2.0, P).astype(np.float32)
        row["mapped_mass"] = row["source_probs"].sum(1).astype(np.float16)
        row["source_index"] = rng.integers(-1, P, P).astype(np.int32)
        row |= {"source_ce": 1.25 + len(name), "source_bytes": 500, "source_tokens": 99}
    return row


def make_rows(n=6, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [make_row(rng, f"row-{'x' * i}", T=40 + 7 * i, **kwargs) for i in range(n)]


def assert_same(got, want, **tolerance):
    assert set(got) == {key for key, value in want.items() if value is not None}
    for key, value in got.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == want[key].dtype, key
            assert value.shape == want[key].shape, key
            if key in tolerance:
                np.testing.assert_allclose(value, want[key], **tolerance[key], err_msg=key)
            else:
                np.testing.assert_array_equal(value, want[key], err_msg=key)
            assert value.flags.writeable, key
        else:
            assert value == want[key], key


def write(path, rows, per_shard=4, kind="representation", identity=None, **kwargs):
    writer = ShardWriter(path, identity or {"options": {"top_k": 10}}, kind=kind, **kwargs)
    shards = range(0, len(rows), per_shard)
    for shard, first in enumerate(shards):
        if not writer.done(shard):
            writer.write(shard, rows[first : first + per_shard], {"skipped": shard})
    writer.finish(len(shards), {"template": "openchat_3.5", "counts": {"skipped": 0}})
    return writer


def files(path):
    return {file.name: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_ids_take_three_bytes_and_come_back():
    ids = np.array([0, -1, 5, 2**24 - 2, 151935, 256, 65536], np.int32)
    assert len(encode_ids(ids)) == 21
    np.testing.assert_array_equal(decode_ids(encode_ids(ids)), ids)
    assert decode_ids(b"").shape == (0,)
    with pytest.raises(ValueError, match="three bytes"):
        encode_ids(np.array([2**24 - 1]))


@pytest.mark.parametrize("aligned", [False, True])
def test_roundtrip_of_every_column(tmp_path, aligned):
    rows = make_rows(aligned=aligned)
    write(tmp_path, rows, kind="aligned" if aligned else "representation")
    stored = load_representation(tmp_path)
    assert len(stored) == 6
    assert stored.ids == [row["id"] for row in rows]
    assert list(stored.num_tokens) == [len(row["input_ids"]) for row in rows]
    # float16 logarithms: an error of 2**-11 |log p| in the logarithm is relative in p
    tolerance = {"source_probs": {"rtol": 2**-11 * 90, "atol": 0}}
    for got, want in zip(stored, rows):
        assert_same(got, want, **tolerance)
    assert_same(stored[-1], rows[-1], **tolerance)
    with pytest.raises(IndexError):
        stored[6]


def test_spans_that_do_not_touch_overlap_or_are_wide(tmp_path):
    row = make_rows(1)[0]
    P = len(row["ce"])
    row["start"] = np.arange(P, dtype=np.int32) * 1000
    row["end"] = row["start"] + 70000
    write(tmp_path, [row])
    assert_same(load_representation(tmp_path)[0], row)


@pytest.mark.parametrize("encoding", ["plain", "compact"])
def test_datasets_opens_it_and_decode_row_reads_its_rows(tmp_path, encoding):
    import datasets

    rows = make_rows(aligned=True)
    write(tmp_path, rows, kind="aligned", encoding=encoding)
    dataset = datasets.load_from_disk(str(tmp_path))
    assert dataset["id"][:] == [row["id"] for row in rows]
    stored = load_representation(tmp_path)
    for n in range(6):
        assert_same(decode_row(dataset[n]), stored[n])


def test_compact_encoding_stays_within_its_stated_error(tmp_path):
    rows = make_rows()
    for row in rows:
        row["topk_logprobs"] = row["topk_logprobs"].astype(np.float32)
        row["topk_logprobs"][0] = [0.0, -0.0009, -1.9999, -2.0, -3.9999, -4.0, -17.31, -40.0, -99.9, -60000.0]
    write(tmp_path, rows, encoding="compact")
    for got, want in zip(load_representation(tmp_path), rows):
        error = np.abs(got["topk_logprobs"].astype(np.float64) - want["topk_logprobs"])
        assert (error <= 1e-3 * np.maximum(1, np.abs(want["topk_logprobs"]))).all()
        assert np.abs(got["ce"] - want["ce"]).max() <= 2**-14 + 1e-6
        for key in ("input_ids", "predicted", "message", "start", "end", "topk_ids"):
            np.testing.assert_array_equal(got[key], want[key], err_msg=key)
        assert (np.diff(got["topk_logprobs"].astype(np.float32), axis=1) <= 0).all()


def test_compact_rows_written_again_do_not_drift(tmp_path):
    write(tmp_path / "a", make_rows(), encoding="compact")
    once = list(load_representation(tmp_path / "a"))
    write(tmp_path / "b", once, encoding="compact")
    for got, want in zip(load_representation(tmp_path / "b"), once):
        np.testing.assert_array_equal(got["topk_logprobs"], want["topk_logprobs"])
        np.testing.assert_array_equal(got["ce"], want["ce"])


def realistic_rows(n=20, T=600, V=151936, seed=0):
    """Half prompt, half answer; sharp distributions over Zipf-distributed ids."""
    rng = np.random.default_rng(seed)
    rows = []
    for name in range(n):
        P = T // 2
        logits = -np.sort(-rng.gumbel(size=(P, 10)) * 3, axis=1)
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True)) - rng.exponential(0.1, (P, 1))
        widths = rng.integers(1, 8, P)
        ids = np.minimum(rng.zipf(1.2, (P, 10)), V - 1) if name % 2 else rng.integers(0, V, (P, 10))
        rows.append(
            {
                "id": str(name),
                "content_hash": f"{name:016x}",
                "input_ids": rng.integers(0, V, T),
                "predicted": np.arange(T - P, T),
                "message": np.ones(P, int),
                "start": np.cumsum(widths) - widths,
                "end": np.cumsum(widths),
                "topk_ids": ids,
                "topk_logprobs": logprobs,
                "ce": rng.exponential(1.0, P),
            }
        )
    return rows


@pytest.mark.parametrize(("encoding", "limit"), [("plain", 68), ("compact", 40)])
def test_bytes_per_predicted_token_with_prompts_half_the_tokens(tmp_path, encoding, limit):
    write(tmp_path, realistic_rows(), per_shard=20, encoding=encoding)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    counts = load_representation(tmp_path).manifest["counts"]
    assert counts["predicted_tokens"] == 6000
    assert counts["bytes_per_predicted_token"] <= size / 6000 <= limit + 1  # 1: the JSON files beside 6,000 tokens


def test_same_rows_give_the_same_bytes_in_any_order_of_writing(tmp_path):
    rows = make_rows(aligned=True)
    write(tmp_path / "a", rows, kind="aligned")
    writer = ShardWriter(tmp_path / "b", {"options": {"top_k": 10}}, kind="aligned")
    writer.write(1, [dict(reversed(row.items())) for row in rows[4:]], {"skipped": 1})
    writer.write(0, rows[:4], {"skipped": 0})
    writer.finish(2, {"template": "openchat_3.5", "counts": {"skipped": 0}})
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_only_missing_shards_are_written_again(tmp_path):
    rows = make_rows()
    write(tmp_path / "whole", rows)
    ShardWriter(tmp_path / "part", {"options": {"top_k": 10}}, kind="representation").write(0, rows[:4], {"skipped": 0})
    (tmp_path / "part" / ".shard-00001.arrow.99.tmp").write_bytes(b"half")
    before = (tmp_path / "part" / "shard-00000.arrow").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"no manifest.json in it. Repeat the command that writes it"):
        load_representation(tmp_path / "part")
    write(tmp_path / "part", rows)
    assert (tmp_path / "part" / "shard-00000.arrow").stat().st_mtime_ns == before
    assert files(tmp_path / "whole") == files(tmp_path / "part")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "json"])
def test_damaged_shard_is_named_and_written_again(tmp_path, caplog, damage):
    rows = make_rows()
    write(tmp_path, rows)
    good = files(tmp_path)
    file = tmp_path / "shard-00001.arrow"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-300] ^= 1
        file.write_bytes(data)
    elif damage == "remove":
        file.unlink()
    else:
        file.with_suffix(".json").write_text("{")
    if damage != "json":
        for read in (lambda store: store[5], lambda store: store.check()):
            with pytest.raises(InputError, match=r"shard-00001.arrow: expected the file the manifest lists"):
                read(load_representation(tmp_path))
        assert load_representation(tmp_path)[0]["id"] == rows[0]["id"]
    with caplog.at_level(logging.WARNING):
        write(tmp_path, rows)
    assert "shard-00001.arrow is damaged" in caplog.text
    assert "shard-00000" not in caplog.text
    assert files(tmp_path) == good


def test_the_sum_of_a_shard_is_taken_once_a_process(tmp_path, monkeypatch):
    write(tmp_path, make_rows())
    taken = []
    counted = lambda file: taken.append(file.name) or file_sha256(file)  # noqa: E731
    monkeypatch.setattr("fusechat_fuse.store.shards.file_sha256", counted)
    _sha256_once.cache_clear()
    for _ in range(2):
        store = load_representation(tmp_path).check()
        assert [row["id"] for row in store] == store.ids
    assert sorted(taken) == [shard["file"] for shard in store.manifest["shards"]]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"identity": {"options": {"top_k": 20}}}, "options.top_k = 10 there and 20 here"),
        ({"identity": {"options": {"top_k": 10}, "model": "m"}}, "model = None there and 'm' here"),
        ({"identity": {"options": {}}}, "options.top_k = 10 there and None here"),
        ({"kind": "aligned"}, "kind = 'representation' there and 'aligned' here"),
        ({"encoding": "compact"}, "encoding = 'plain' there and 'compact' here"),
    ],
)
def test_another_run_is_refused_with_the_difference_and_nothing_changes(tmp_path, changes, difference):
    write(tmp_path, make_rows())
    good = files(tmp_path)
    with pytest.raises(InputError, match=re.escape(f"got another run's ({difference}). Choose another directory or")):
        write(tmp_path, make_rows(), **changes)
    assert files(tmp_path) == good


def test_directory_without_a_row_is_free_and_its_earlier_owner_is_told(tmp_path):
    rng = np.random.default_rng(0)
    first = ShardWriter(tmp_path / "r", {"top_k": 3}, kind="representation")
    first.write(0, [], {"skipped": []})
    second = ShardWriter(tmp_path / "r", {"top_k": 10}, kind="representation")
    assert not (second.path / "shard-00000.json").exists()
    with pytest.raises(InputError, match="expected this run's identity, got another run's"):
        first.write(1, [make_row(rng, "a")])
    second.write(0, [make_row(rng, "a")])
    second.release()  # nothing to give up any more
    with pytest.raises(InputError, match="top_k = 10 there and 3 here"):
        ShardWriter(tmp_path / "r", {"top_k": 3}, kind="representation")
    ShardWriter(tmp_path / "s", {"top_k": 3}, kind="representation")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="top_k = 3 there and 10 here"):
        ShardWriter(tmp_path / "s", {"top_k": 10}, kind="representation")


def test_directory_with_other_files_or_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"got other files \('model.safetensors'\)"):
        write(tmp_path, make_rows())
    with pytest.raises(InputError, match="got a file"):
        write(tmp_path / "model.safetensors", make_rows())
    assert files(tmp_path) == {"model.safetensors": b"precious"}


def test_what_a_kill_left_of_the_first_file_is_no_other_file(tmp_path):
    (tmp_path / ".identity.json.99.tmp").write_bytes(b"{")
    write(tmp_path, make_rows())
    assert load_representation(tmp_path).ids


def test_process_that_claims_between_two_looks_is_no_stranger(tmp_path):
    def found():
        (tmp_path / "identity.json").write_text("{}")

    check_claim(tmp_path, {}, found)


def test_identity_that_is_no_json_is_said(tmp_path):
    write(tmp_path, make_rows())
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(InputError, match=r"identity for .*identity.json: expected JSON, got"):
        write(tmp_path, make_rows())


def test_what_is_no_representation_is_said(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        load_representation(tmp_path / "nowhere")
    write(tmp_path, make_rows())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 1}))
    with pytest.raises(InputError, match=r"expected schema version 2, got 1. Make it again with this version"):
        load_representation(tmp_path)


def test_shards_without_rows_are_no_hole_and_none_at_all_is_an_error(tmp_path):
    rows = make_rows(2)
    for name, shards in (("some", [rows[:1], [], rows[1:]]), ("none", [[], []])):
        writer = ShardWriter(tmp_path / name, {}, kind="representation")
        for n, shard in enumerate(shards):
            writer.write(n, shard)
            assert writer.done(n)
        if name == "none":
            with pytest.raises(InputError, match="at least one usable conversation"):
                writer.finish(len(shards), {})
        else:
            writer.finish(len(shards), {})
            assert load_representation(tmp_path / name).ids == [row["id"] for row in rows]


@pytest.mark.parametrize("encoding", ["plain", "compact"])
def test_log_probabilities_out_of_float16_stay_finite_and_rounding_above_one_is_one(tmp_path, encoding):
    row = make_rows(1)[0]
    row["topk_logprobs"] = row["topk_logprobs"].astype(np.float32)
    row["topk_logprobs"][0, 0], row["topk_logprobs"][0, -1], row["ce"][0] = 3e-7, -1e9, -2e-7
    write(tmp_path, [row], encoding=encoding)
    stored = load_representation(tmp_path)[0]
    assert stored["topk_logprobs"][0, 0] == stored["ce"][0] == 0
    assert np.isfinite(stored["topk_logprobs"]).all()
    assert stored["topk_logprobs"][0, -1] <= -59000


def test_compact_encoding_refuses_rows_that_are_not_descending(tmp_path):
    row = make_rows(1)[0]
    row["topk_logprobs"] = row["topk_logprobs"][:, ::-1]
    with pytest.raises(ValueError, match="topk_logprobs of 'row-': expected each row descending"):
        write(tmp_path, [row], encoding="compact")


def test_lengths_that_disagree_and_unknown_arrays_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, {}, kind="representation")
    row = make_rows(1)[0]
    with pytest.raises(ValueError, match="ce of 'row-': expected"):
        writer.write(0, [{**row, "ce": row["ce"][1:]}])
    with pytest.raises(ValueError, match="novel of 'row-'"):
        writer.write(0, [{**row, "novel": row["ce"]}])


def test_works_as_a_torch_dataset_in_workers(tmp_path):
    from torch.utils.data import DataLoader

    rows = make_rows()
    write(tmp_path, rows)
    stored = load_representation(tmp_path)
    stored[0]  # opened before the workers start
    loader = DataLoader(stored, batch_size=None, num_workers=2, shuffle=False)
    assert [row["id"] for row in loader] == stored.ids
    assert_same(pickle.loads(pickle.dumps(stored))[3], rows[3])


@pytest.fixture
def with_files(tmp_path, tiny_unigram):
    """A store with a tokenizer and `skipped.jsonl`."""
    writer = ShardWriter(tmp_path / "r", {}, kind="representation")
    writer.write(0, make_rows(2))
    save_tokenizer(tiny_unigram, writer.path)
    save_tokenizer(tiny_unigram, writer.path)
    (writer.path / "skipped.jsonl").write_bytes(b"")
    writer.finish(1, {})
    return load_representation(writer.path)


def test_the_tokenizer_in_the_directory_is_the_models(with_files, tiny_unigram):
    text = "Hello  wörld"
    read = read_tokenizer(with_files)
    assert read.encode(text, add_special_tokens=False).ids == tiny_unigram(text, add_special_tokens=False).input_ids
    assert "skipped.jsonl" in with_files.manifest["files"]
    assert not list(with_files.path.glob(".*"))


@pytest.mark.parametrize("damage", ["flipped bit", "half", "empty", "not UTF-8", "gone", "another"])
def test_a_tokenizer_that_is_not_the_manifests_is_refused(damage, with_files, tiny_bpe, tiny_unigram, tmp_path):
    file = with_files.path / "tokenizer" / "tokenizer.json"
    data = bytearray(file.read_bytes())
    data[data.index(b"the")] ^= 1
    content = {"flipped bit": data, "half": data[:100], "empty": b"", "not UTF-8": b"\xff\xfe"}
    if damage == "another":
        tiny_bpe.save_pretrained(file.parent)
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[damage])
    (tmp_path / "copy").mkdir()
    for read in (lambda: read_tokenizer(with_files), lambda: copy_tokenizer(with_files, tmp_path / "copy")):
        with pytest.raises(InputError, match=r"tokenizer/tokenizer.json: expected the file the manifest lists"):
            read()
    assert list((tmp_path / "copy").iterdir()) == []
    save_tokenizer(tiny_unigram, with_files.path)  # what a repeated run does mends it
    assert read_tokenizer(with_files).get_vocab_size() == len(tiny_unigram)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", r"manifest.json: expected an object, got \[\]"),
        (b"{", "manifest.json: expected JSON"),
        (b'{"schema_version": 2}', "manifest.json: expected an entry 'shards', got none"),
        (b'{"schema_version": 2, "shards": [{"file": "x"}]}', "manifest.json: expected an entry 'rows', got none"),
    ],
)
def test_a_manifest_that_is_none_is_refused(content, message, with_files):
    (with_files.path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_representation(with_files.path)


def test_a_row_or_column_that_is_missing_is_named(tmp_path, monkeypatch):
    whole = shard_writer.encode_row
    with monkeypatch.context() as patched:
        patched.setattr(
            shard_writer, "encode_row", lambda *given: {k: v for k, v in whole(*given).items() if k != "ce"}
        )
        writer = ShardWriter(tmp_path, {}, kind="representation")
        writer.write(0, make_rows(1))
        writer.finish(1, {})
    stored = load_representation(tmp_path)
    with pytest.raises(InputError, match=r"row 0 for .*: expected the fields of docs/format.md, got KeyError\('ce'\)"):
        stored[0]
    with pytest.raises(InputError, match=r"shard-00000.arrow: expected a column 'ce', got none"):
        stored.column("ce")


@pytest.mark.parametrize("width", [1, 2, 10, 300])
@pytest.mark.parametrize("total", [0.7, 1.0, 1.0004])
def test_source_rows_never_exceed_one_and_stay_within_a_float16(width, total):
    rng = np.random.default_rng(width)
    probs = np.exp(rng.normal(0, 2.5, (400, width)))
    probs = probs / probs.sum(1, keepdims=True) * total
    kept = probs > np.quantile(probs, 0.2) if width > 2 else probs > 0
    row = make_row(rng, "x") | {"source_ids": np.where(kept, 1, -1), "source_probs": np.where(kept, probs, 0)}
    read = _decode_source(_encode_source(row, 400), 400)["source_probs"].astype(np.float64)
    assert read.sum(1).max() <= 1
    expected = probs / np.maximum(np.where(kept, probs, 0).sum(1, keepdims=True), 1)
    for got, mask, wanted in zip(read, kept, expected):
        wanted = wanted[mask]
        spacing = np.spacing(np.abs(np.log(wanted)).astype(np.float16)).astype(np.float64)
        error = np.abs(np.log(got[: len(wanted)]) - np.log(wanted))
        assert (error < spacing + 5e-7).all()  # 5e-7: of float32
        assert np.abs(got.sum() - wanted.sum()) < 1e-3
        assert width < 10 or (error > 0.52 * spacing).mean() < 0.6  # only as many as need it
