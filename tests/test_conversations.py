"""Chat data of every shape becomes one; what is not usable is skipped by rule, counted, and named when asked."""

import gzip
import json
import logging
import os
import pickle
import tempfile
import tracemalloc
from functools import partial

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.card import hub_data
from fusechat_fuse.text.conversations import load_conversations, read_conversations
from fusechat_fuse.text.messages import content_hash

USER, ANSWER = {"role": "user", "content": "Hello 你好"}, {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = {
    "id": "a",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello 你好"},
        {"from": "gpt", "value": "Hi"},
    ],
}
MESSAGES = {"id": 7, "messages": [SYSTEM, USER, ANSWER], "slice": "chat"}
PROMPT = {"prompt": "Hello 你好", "completion": "Hi"}
PROMPT_LISTS = {"prompt": [USER], "completion": [ANSWER]}


def as_json(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")


def as_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")


def as_parquet(path, rows):
    parquet.write_table(pa.Table.from_pylist(rows), path)


def as_saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


def as_splits(path, rows):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))


def as_folder(path, rows):
    path.mkdir()
    as_jsonl(path / "part-0.jsonl", rows[:1])
    as_json(path / "part-1.json", rows[1:])


WRITERS = {".json": as_json, ".jsonl": as_jsonl, ".parquet": as_parquet, "": as_saved, "d": as_splits, "f": as_folder}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_sharegpt_in_every_container(tmp_path, kind):
    path = tmp_path / f"data{kind}"
    second = {"id": "b", "conversations": SHAREGPT["conversations"][1:]}
    WRITERS[kind](path, [SHAREGPT, second])
    data = load_conversations(str(path))
    assert data.column_names == ["id", "messages"]
    assert data["id"][:] == ["a", "b"]
    assert data[0]["messages"] == [SYSTEM, USER, ANSWER]
    assert data[1]["messages"] == [USER, ANSWER]


def test_all_shapes_read_alike(tmp_path):
    path = tmp_path / "data.json"
    as_json(path, [SHAREGPT, MESSAGES, PROMPT, PROMPT_LISTS])
    data = load_conversations(path)
    assert data[0]["messages"] == data[1]["messages"]
    assert data[2]["messages"] == data[3]["messages"] == [USER, ANSWER]
    assert data["slice"][:] == [None, "chat", None, None]
    digest = content_hash([USER, ANSWER])
    assert data["id"][:] == ["a", "7", digest, f"{digest}#2"]


def test_ids_are_stable_hashes_of_the_content():
    # sha256sum of '[["user","Hello \\u4f60\\u597d"],["assistant","Hi"]]': must never change, alignments join on it
    assert content_hash([USER, ANSWER]) == "5304872701e122e8"
    assert content_hash([USER, {**ANSWER, "content": "Hi "}]) != content_hash([USER, ANSWER])
    found, _ = read_conversations([{"messages": [{**USER, "name": "x"}, ANSWER]}])
    assert found[0].id == found[0].content_hash == content_hash([USER, ANSWER])


SKIPPED = {
    "not_chat": [{"text": "no chat"}, "just a string", {"messages": "text"}, {"prompt": "alone"}],
    "empty": [{"messages": []}, {"conversations": []}],
    "not_text": [
        {"messages": [{"role": "user", "content": None}, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}, ANSWER]},
        {"messages": [{"content": "no role"}, ANSWER]},
        {"messages": ["x", ANSWER]},
        {"messages": [USER, {**ANSWER, "content": []}]},
        {"prompt": 3, "completion": "x"},
    ],
    "lone_surrogate": [
        {"messages": [{"role": "user", "content": "a\ud800b"}, ANSWER]},
        {"id": "a\ud800", "messages": [USER, ANSWER]},
        {"dataset": "a\ud800", "messages": [USER, ANSWER]},
    ],
    "unknown_role": [{"messages": [{"role": "observer", "content": "x"}, ANSWER]}],
    "system_not_first": [
        {"messages": [USER, ANSWER, SYSTEM, USER, ANSWER]},
        {"messages": [SYSTEM, SYSTEM, USER, ANSWER]},
    ],
    "repeated_role": [{"messages": [USER, USER, ANSWER]}, {"messages": [USER, ANSWER, ANSWER]}],
    "no_answer": [
        {"messages": [USER]},
        {"messages": [SYSTEM]},
        {"messages": [ANSWER]},
        {"messages": [ANSWER, USER]},
        {"messages": [USER, {**ANSWER, "weight": 0}]},
    ],
    "unwanted": [{"prompt": "x", "completion": "y", "label": False}],
    "tool_calls": [{"messages": [USER, {**ANSWER, "tool_calls": [{"function": {}}]}, USER, ANSWER]}],
}
REPAIRED = {
    "leading_assistant": ({"messages": [SYSTEM, ANSWER, ANSWER, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "trailing_user": ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER]),
    "tools": ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, [USER, ANSWER]),
    "documents": ({"messages": [USER, ANSWER], "documents": [{"text": "x"}]}, [USER, ANSWER]),
    "images": ({"messages": [USER, ANSWER], "images": ["x.png"]}, [USER, ANSWER]),
    "reasoning_content": ({"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]}, [USER, ANSWER]),
    "system_column": ({"messages": [SYSTEM, USER, ANSWER], "system": "Be long."}, [SYSTEM, USER, ANSWER]),
    "weight": ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, [USER, ANSWER]),
    "unknown_mark": ({"messages": [USER, {**ANSWER, "learn": "false"}]}, [USER, ANSWER]),
    "empty_answer": (
        {"messages": [USER, {**ANSWER, "content": " \n"}, USER, {**ANSWER, "content": "", "weight": 0}, USER, ANSWER]},
        [USER, {**ANSWER, "content": " \n"}, USER, {**ANSWER, "content": "", "weight": 0}, USER, ANSWER],
    ),
    "duplicate_id": ({"id": "good", "messages": [USER, ANSWER]}, [USER, ANSWER]),
}


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason, rows in SKIPPED.items() for row in rows])
def test_unusable_rows_are_skipped_by_rule_and_named_when_strict(tmp_path, caplog, reason, row):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in [{"id": "good", "messages": [USER, ANSWER]}, row]))
    with caplog.at_level(logging.WARNING):
        found, report = read_conversations(path)
    assert [c.id for c in found] == ["good"]
    assert report.counts() == {"rows": 2, "skipped": {reason: 1}, "repaired": {}}
    assert report.skipped[0]["row"] == 1
    assert report.skipped[0]["detail"]
    assert reason in caplog.text
    with pytest.raises(InputError, match=rf"data.jsonl, row 1: .*\({reason}\). Correct the row") as caught:
        load_conversations(path, strict=True)
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"expected at least one usable conversation, got none \(row 0: "):
        load_conversations(path)


@pytest.mark.parametrize("rule", list(REPAIRED))
def test_repairs_are_made_by_rule_counted_and_errors_when_strict(rule):
    row, messages = REPAIRED[rule]
    rows = [{"id": "good", "messages": [USER, ANSWER]}, row]
    found, report = read_conversations(rows)
    assert found[1].messages == messages
    assert found[1].content_hash == content_hash(messages)
    assert report.counts() == {"rows": 2, "skipped": {}, "repaired": {rule: 1}}
    assert len({c.id for c in found}) == 2
    with pytest.raises(InputError, match=rf"the given rows, row 1: .*\({rule}\)"):
        read_conversations(rows, strict=True)


def test_empty_contents_are_conversation():
    rows = [{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}]
    found, report = read_conversations(rows)
    assert found[0].messages == rows[0]["messages"]
    assert report.counts() == {"rows": 1, "skipped": {}, "repaired": {"empty_answer": 1}}
    assert read_conversations(rows, prompts=True)[1].counts()["repaired"] == {}  # it is left out


def test_fields_that_hold_nothing_are_no_loss():
    bare = {"tool_calls": None, "reasoning_content": None, "weight": None}
    row = {"messages": [{**USER, **bare}, {**ANSWER, **bare, "weight": 1}], "tools": None, "images": [], "system": ""}
    found, report = read_conversations([row, {**row, "id": 2, "tools": "[]"}], strict=True)
    assert found[0].messages == [USER, ANSWER]
    assert report.counts() == {"rows": 2, "skipped": {}, "repaired": {}}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row", [{"messages": [USER, ANSWER]}, PROMPT, {"conversations": SHAREGPT["conversations"][1:]}]
)
def test_system_column_is_the_system_message(column, row):
    blank = {"id": "blank", "messages": [{**SYSTEM, "content": " "}, USER, ANSWER]}
    rows = [{**each, column: "Be brief."} for each in (row, MESSAGES, blank)]
    found, report = read_conversations(rows, strict=True)
    assert all(conversation.messages == [SYSTEM, USER, ANSWER] for conversation in found)
    assert report.counts()["repaired"] == {}


def test_answers_of_weight_0_stay_as_context_and_are_read_again(tmp_path):
    light = {**ANSWER, "weight": 0}
    as_json(tmp_path / "d.json", [{"messages": [USER, light, USER, {**ANSWER, "weight": 1.0}, USER, light]}, MESSAGES])
    data = load_conversations(tmp_path / "d.json")
    found, report = read_conversations(data)
    assert found[0].messages == [USER, light, USER, ANSWER]
    assert found[1].messages == [SYSTEM, USER, ANSWER]
    assert data["id"][0] == found[0].content_hash == content_hash(found[0].messages)
    assert found[0].content_hash != content_hash([USER, ANSWER, USER, ANSWER])
    assert not report.repaired


OFF = [False, 0, 0.0, "false", "False", "0", "no", np.False_, np.int64(0), np.float32(0)]
ON = [True, 1, 1.0, "true", "TRUE", "1", "yes", np.True_, np.int64(1), None]


@pytest.mark.parametrize(
    ("field", "off", "on"),
    [
        *((name, off, on) for name in ("weight", "train", "loss") for off, on in zip(OFF, ON)),
        *((name, False, True) for name in ("training", "trainable", "loss_weight", "loss_mask", "compute_loss")),
        *(("masked", on, off) for off, on in zip(OFF, ON) if on is not None),
        ("masked", True, None),
        ("ignore_loss", 1, 0),
    ],
)
def test_answer_that_is_not_to_be_trained_on_has_weight_0(field, off, on):
    row = {"messages": [USER, {**ANSWER, field: off}, USER, {**ANSWER, field: on}]}
    found, _ = read_conversations([row], strict=True)
    assert found[0].messages == [USER, {**ANSWER, "weight": 0}, USER, ANSWER]


def test_marks_that_are_not_understood_are_told_and_others_are_not():
    odd = {"weight": "half", "loss": 0.53, "mask": [1, 0], "training_detail": [{"train": False}], "flagged": False}
    row = {"messages": [{**USER, "loss": False}, {**ANSWER, **odd, "name": "bot", "tokens": 3, "loss_scale": None}]}
    found, report = read_conversations([row])
    assert found[0].messages == [USER, ANSWER]
    assert [(e["reason"], e["detail"]) for e in report.repaired] == [
        ("weight", "message 1: weight 'half', loss 0.53 taken as 1"),
        ("unknown_mark", "message 1 is predicted: mask, training_detail, flagged not understood"),
    ]


def test_rows_of_a_data_frame_are_read_as_those_of_its_file(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [
        {
            "id": n,
            "system": [None, "Be brief."][n],
            "tools": [],
            "messages": [{**m, "tool_calls": [], "thinking": [], "weight": None} for m in (USER, ANSWER)],
        }
        for n in range(2)
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "d.parquet")
    frame = pandas.read_parquet(tmp_path / "d.parquet")
    frames = [frame, frame.convert_dtypes(), frame.assign(system=[float("nan"), "Be brief."])]
    expected, _ = read_conversations(tmp_path / "d.parquet", strict=True)
    assert [c.id for c in expected] == ["0", "1"]
    for each in frames:
        found, _ = read_conversations(each.to_dict("records"), strict=True)
        assert [(c.id, c.messages) for c in found] == [(c.id, c.messages) for c in expected]
    thinking = [USER, {**ANSWER, "thinking": np.array(["so"]), "content": np.array([{"type": "text", "text": "Hi"}])}]
    _, report = read_conversations([{"messages": np.array(thinking), "system": np.array(["x"])}])
    assert report.counts()["repaired"] == {"reasoning_content": 1, "system_column": 1}


def test_ids_are_unique_whatever_names_the_rows_bring():
    rows = [{"id": name, "messages": [USER, ANSWER]} for name in ("0", "0", "0#2", "0", "0#2#2", "0#2")]
    found, report = read_conversations(rows)
    names = [c.id for c in found]
    assert len(set(names)) == 6
    assert names[:4] == ["0", "0#2", "0#2#2", "0#3"]
    assert report.counts()["repaired"] == {"duplicate_id": 5}


def test_whole_numbers_of_a_column_with_gaps_are_ids_as_in_one_without(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"id": [7, None, 2**40], "messages": [[USER, ANSWER]] * 3})
    assert frame["id"].dtype == float
    frame.to_parquet(tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_text(frame.to_json(orient="records", lines=True))
    for data in (tmp_path / "d.parquet", tmp_path / "d.jsonl", frame.to_dict("records")):
        found, _ = read_conversations(data)
        assert [one.id for one in found] == ["7", found[1].content_hash, str(2**40)]
    assert [one.id for one in read_conversations([{"id": 0.5, "messages": [USER, ANSWER]}])[0]] != ["0.5"]


def parts(text):
    return [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{**m, "content": parts(m["content"])} for m in (SYSTEM, USER, ANSWER)]},
        {"messages": [{**SYSTEM, "role": "developer"}, USER, ANSWER]},
        {"messages": [], "conversations": SHAREGPT["conversations"]},
        {"messages": None, "conversations": SHAREGPT["conversations"]},
        {"messages": SHAREGPT["conversations"]},
        {"messages": (SYSTEM, USER, {**ANSWER, "content": ({"text": "Hi"},)})},
        {"messages": np.array([SYSTEM, USER, ANSWER]), "tools": np.array([])},
        {"prompt": [SYSTEM, USER], "completion": "Hi"},
        {"prompt": "Hello 你好", "completion": [ANSWER], "system": "Be brief."},
    ],
    ids=["parts", "developer", "empty", "none", "from_value", "tuples", "arrays", "prompt_list", "completion_list"],
)
def test_shapes_that_people_have(row):
    found, report = read_conversations([row], strict=True)
    assert found[0].messages == [SYSTEM, USER, ANSWER]
    assert not report.repaired


def test_messages_column_by_name():
    row = {"id": "a", "dialog": SHAREGPT["conversations"], "messages": "no list"}
    assert read_conversations([row], messages_column="dialog")[0][0].messages == [SYSTEM, USER, ANSWER]
    with pytest.raises(InputError, match="expected a list in column dialogue, got id, dialog, messages"):
        read_conversations([row], messages_column="dialogue")


def test_limit_reads_no_further_than_so_many_usable_conversations():
    def rows():
        yield {"messages": []}
        for n in range(2):
            yield {"id": n, "messages": [USER, ANSWER]}
        pytest.fail("read on")

    found, report = read_conversations(rows(), limit=2)
    assert [c.id for c in found] == ["0", "1"]
    assert report.counts() == {"rows": 3, "skipped": {"empty": 1}, "repaired": {}}
    for limit in (0, -1, "2", True):
        with pytest.raises(InputError, match="limit for chat data: expected an integer from 1, got"):
            read_conversations([MESSAGES], limit=limit)


def compressed(path, text):
    raw = text.encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(raw)
    elif path.suffix == ".parquet":
        rows = [json.loads(line) for line in text.splitlines()]
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=16)
    else:
        path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst", "d.parquet"])
def test_a_corpus_is_never_held_in_memory(tmp_path, name):
    texts = [f"{n:06d}" * 4000 for n in range(400)]  # 24 kB each, 9.6 MB in all
    lines = [json.dumps({"prompt": "say", "completion": text}) + "\n" for text in texts]
    file = compressed(tmp_path / name, "".join(lines))
    del lines
    read_conversations([MESSAGES])  # modules that are loaded on first use
    tracemalloc.start()
    found, report = read_conversations(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert report.rows == 400
    for n in (399, 0, 200):
        assert found[n].messages == [{"role": "user", "content": "say"}, {"role": "assistant", "content": texts[n]}]
        assert found[n].content_hash == content_hash(found[n].messages)


def test_temporary_file_without_room_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"^temporary file for the conversations: expected room below TMPDIR, got "):
        read_conversations([MESSAGES])
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(open, "/dev/full", "wb"))
    with pytest.raises(InputError, match=r"got \[Errno 28\] No space left on device. Set TMPDIR to "):
        read_conversations([{"prompt": "say", "completion": "x" * 100_000}])


def test_byte_that_is_no_text_is_named_by_its_place_in_the_file(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\n\n{"prompt": "\xff"}')
    with pytest.raises(InputError, match=r"d.jsonl: expected UTF-8 text, got another byte at 51"):
        read_conversations(tmp_path / "d.jsonl")
    assert len(read_conversations(tmp_path / "d.jsonl", limit=1)[0]) == 1


@pytest.mark.parametrize("name", ["d.json", "d.json.gz", "d.jsonl"])
def test_what_is_no_text_is_said_once(tmp_path, name):
    raw = b'[{"prompt": "\xff"}]'
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(InputError) as caught:
        read_conversations(tmp_path / name)
    assert str(caught.value) == (
        f"data for {tmp_path / name}: expected UTF-8 text, got another byte at 13. Convert it."
    )


def test_place_in_a_line_is_counted_in_that_line(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n{"prompt": "a\n')
    with pytest.raises(InputError, match=r"d.jsonl, line 2: expected JSON, got Expecting value: line 1 column "):
        read_conversations(tmp_path / "d.jsonl")


@pytest.mark.parametrize("group", [200, 64, 9])
def test_parquet_of_dictionaries_within_messages_is_read_in_any_row_groups(tmp_path, group):
    text = pa.dictionary(pa.int8(), pa.string())
    rows = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}] for n in range(100)]
    messages = pa.array(rows, pa.list_(pa.struct([("role", text), ("content", pa.string())])))
    parquet.write_table(pa.table({"messages": messages}), tmp_path / "d.parquet", row_group_size=group)
    found, _ = read_conversations(tmp_path / "d.parquet")
    assert [one.messages for one in found] == rows


def test_conversations_pickle():
    found, _ = read_conversations([SHAREGPT, {"id": "b", "slice": "s", **MESSAGES}])
    for one, again in zip(found, pickle.loads(pickle.dumps(found)), strict=True):
        assert again.messages == one.messages
        assert (again.id, again.content_hash, again.slice, again.row) == (one.id, one.content_hash, one.slice, one.row)


@pytest.mark.parametrize(
    ("given", "name"),
    [(np.str_("maths"), "maths"), (3, "3"), (np.int64(0), "0"), (True, None), ("", None), (0.5, None)],
)
def test_names_of_slices_may_be_numpys_and_numbers(given, name):
    assert read_conversations([{**MESSAGES, "slice": given}])[0][0].slice == name


def named(name):
    return [{"id": name, "messages": [USER, ANSWER]}]


def ids_in(data, **options):
    return load_conversations(data, **options)["id"][:]


def test_texts_of_every_usual_kind_compressed_or_not(tmp_path):
    as_jsonl(tmp_path / "a.ndjson", named("a"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(named("b")[0]).encode()))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(named("c")).encode()))
    as_json(tmp_path / "d.json", {"train": named("d"), "test": named("e")})
    as_json(tmp_path / "f.json", {"version": "1", "data": named("f")})
    for file in ("a.ndjson", "b.jsonl.gz", "c.json.gz", "d.json", "f.json"):
        assert ids_in(tmp_path / file) == [file[0]]
    assert ids_in(tmp_path / "d.json", split="test") == ["e"]


def test_several_files_and_globs_and_objects_with_splits(tmp_path):
    for name in "abc":
        as_jsonl(tmp_path / f"{name}.jsonl", named(name))
    assert ids_in([tmp_path / "c.jsonl", str(tmp_path / "a.jsonl")]) == ["c", "a"]
    assert ids_in(str(tmp_path / "[ab]*.jsonl")) == ["a", "b"]
    assert ids_in([str(tmp_path / "*.jsonl")], limit=2) == ["a", "b"]
    with pytest.raises(InputError, match=r"expected files of this pattern, got none"):
        ids_in(str(tmp_path / "*.parquet"))
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(named("a")), "test": datasets.Dataset.from_list(named("b"))}
    )
    assert (ids_in(splits), ids_in(splits, split="test")) == (["a"], ["b"])
    assert ids_in({"train": named("a")}) == ["a"]
    with pytest.raises(InputError, match="split for the given rows: expected one of train, test, got 'dev'"):
        ids_in(splits, split="dev")
    as_jsonl(tmp_path / "b.jsonl", [{"id": "good", "messages": [USER, ANSWER]}, {"messages": []}])
    with pytest.raises(InputError, match=r"conversation for \S*b.jsonl, row 1: "):
        ids_in([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], strict=True)


def test_each_of_several_files_is_a_slice_where_its_rows_name_none(tmp_path):
    def slices(*names) -> list:
        rows = load_conversations([str(tmp_path / name) for name in names])
        return rows["slice"] if "slice" in rows.column_names else None

    for name in ("code.jsonl", "math.v2.jsonl", "train-00001-of-00002.jsonl", "train-00002-of-00002.jsonl"):
        as_jsonl(tmp_path / name, named(name))
    as_jsonl(tmp_path / "own.jsonl", [{**row, "category": "poems"} for row in named("own")])
    assert slices("code.jsonl", "math.v2.jsonl", "own.jsonl") == ["code", "math", "poems"]
    as_jsonl(tmp_path / "none.jsonl", [{**row, "slice": ""} for row in named("none")])  # said to have none
    assert slices("code.jsonl", "none.jsonl") == ["code", None]
    assert slices("code.jsonl") is None
    parts = ("train-00001-of-00002.jsonl", "train-00002-of-00002.jsonl")
    assert slices(*parts) is None  # parts of one
    assert slices("code.jsonl", *parts) == ["code", "train", "train"]


def test_directory_is_read_by_split_and_what_is_left_out_is_said(tmp_path, caplog):
    for name in ("train", "test"):
        as_jsonl(tmp_path / f"{name}.jsonl", named(name))
    (tmp_path / "train-2.jsonl.gz").write_bytes(gzip.compress(json.dumps(named("gz")[0]).encode()))
    as_json(tmp_path / "dataset_infos.json", {"default": {"features": {}}})
    (tmp_path / "more.csv").write_text("a,b")
    (tmp_path / "README.md").write_text("# Data\n")
    with caplog.at_level(logging.WARNING):
        assert ids_in(tmp_path) == ["gz", "train"]
    assert "2 files belong to split 'train'; left out: test.jsonl" in caplog.text
    assert "files of other formats are not read: more.csv" in caplog.text
    assert ids_in(tmp_path, split="test") == ["test"]
    with pytest.raises(InputError, match="expected one of test, train, got 'validation'"):
        ids_in(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("files", "split", "want"),
    [
        (["chat.jsonl", "more.jsonl"], "train", ["chat", "more"]),
        (["chat.jsonl", "eval.jsonl"], "train", ["chat"]),
        (["chat.jsonl", "eval.jsonl"], "test", ["eval"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
         "train", ["train-00000-of-00002", "train-00001-of-00002"]),
        (["train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl"], "train_sft",
         ["train_sft-00000-of-00001"]),
        (["train/a.jsonl", "validation/a2.jsonl", ".cache/a3.jsonl"], "validation", ["a2"]),
        (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], "train",
         ["part-00000-of-00002", "part-00001-of-00002"]),
        (["latest.jsonl", "contest.jsonl"], "train", ["contest", "latest"]),
        (["train/test_questions.jsonl", "test/a4.jsonl"], "train", ["test_questions"]),
        (["train/test.jsonl", "test/a5.jsonl"], "test", ["a5"]),
        (["train_sft/a6.jsonl", "test_sft/a7.jsonl"], "train_sft", ["a6"]),
    ],
)  # fmt: skip
def test_split_of_a_file_is_what_its_path_names(tmp_path, files, split, want):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        as_jsonl(tmp_path / file, named(file.rsplit("/")[-1].split(".")[0]))
    assert ids_in(tmp_path, split=split) == ids_in(f"{tmp_path}/**/*.jsonl", split=split) == want


def test_glob_over_several_splits_is_read_by_split_and_what_is_left_out_is_said(tmp_path, caplog):
    for name in ("train-0", "train-1", "test-0"):
        as_jsonl(tmp_path / f"{name}.jsonl", named(name))
    with caplog.at_level(logging.WARNING):
        assert ids_in(f"{tmp_path}/*.jsonl") == ["train-0", "train-1"]
    assert f"{tmp_path}/*.jsonl: 2 files belong to split 'train'; left out: test-0.jsonl" in caplog.text
    assert ids_in(f"{tmp_path}/*.jsonl", split="test") == ids_in(f"{tmp_path}/test*.jsonl") == ["test-0"]
    with pytest.raises(InputError, match="expected one of test, train, got 'validation'"):
        ids_in(f"{tmp_path}/*.jsonl", split="validation")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("pattern", ["", "/*"])
def test_file_beside_its_compressed_copy_is_refused(tmp_path, pattern, suffix):
    as_jsonl(tmp_path / "train.jsonl", named("a"))
    data, copy = (tmp_path / "train.jsonl").read_bytes(), tmp_path / f"train.jsonl{suffix}"
    copy.write_bytes(gzip.compress(data) if suffix == ".gz" else pa.compress(data, codec="zstd", asbytes=True))
    with pytest.raises(
        InputError, match=rf"expected each file once, got train.jsonl and train.jsonl{suffix}. Give the files"
    ):
        ids_in(f"{tmp_path}{pattern}")
    assert ids_in(copy) == ["a"]


def test_split_that_one_file_or_data_set_does_not_have_is_refused(tmp_path):
    as_jsonl(tmp_path / "chat.jsonl", named("a"))
    as_json(tmp_path / "chat.json", named("a"))
    as_saved(tmp_path / "saved", named("a"))
    for name in ("chat.jsonl", "chat.json", "saved"):
        with pytest.raises(InputError, match=f"{name}: expected none, as its data has none, got 'test'. Leave it out"):
            ids_in(tmp_path / name, split="test")
    as_jsonl(tmp_path / "test.jsonl", named("b"))
    assert ids_in(tmp_path / "test.jsonl") == ids_in(tmp_path / "test.jsonl", split="test") == ["b"]


def test_clone_of_a_hub_data_set_is_read_as_its_readme_says(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "clone"
    (folder / "data").mkdir(parents=True)
    for name in ("one", "two"):
        as_jsonl(folder / "data" / f"{name}.jsonl", named(name))
    listed = "- split: train\n    path: data/one.jsonl\n  - split: test\n    path: data/two.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n  {listed}---\n# Data\n")
    assert ids_in(folder) == ["one"]
    assert ids_in(folder, split="test") == ["two"]
    (file,) = folder.rglob("one.jsonl")
    before = file.stat()
    as_jsonl(file, named("new"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as unpacked archives and images have them
    assert ids_in(folder) == ["new"]


def test_roles_by_their_usual_names():
    turns = [("human", "Assistant"), ("USER", "gpt"), ("user", "model"), (" human ", "chatgpt"), ("user", "bot")]
    for user, assistant in turns:
        row = {"conversations": [{"from": user, "value": "a"}, {"from": assistant, "value": "b"}]}
        found, _ = read_conversations([row])
        assert [m["role"] for m in found[0].messages] == ["user", "assistant"]


def test_result_is_read_again_unchanged(tmp_path):
    as_json(tmp_path / "data.json", [SHAREGPT, MESSAGES])
    data = load_conversations(tmp_path / "data.json")
    found, report = read_conversations(data)
    assert [(c.id, c.slice) for c in found] == [("a", None), ("7", "chat")]
    assert not report.skipped


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.json", '{"a": 1', "expected JSON, got "),
        ("d.json", '{"messages": []}', "expected a list of conversations, got a single object. Put it into a list."),
        ("d.json", '"text"', "expected a list of conversations, got str"),
        ("d.json", "[]", "expected at least one usable conversation, got no rows"),
        ("d.jsonl", '{"messages": []}\n{"mess', r"d.jsonl, line 2: expected JSON, got .* Correct the line."),
        ("d.jsonl", "\x00", r"d.jsonl, line 1: expected JSON"),
        ("d.json", "[" * 200_000, "expected JSON, got maximum recursion depth exceeded"),
        ("d.jsonl", '{"a":' * 200_000, "line 1: expected JSON, got maximum recursion depth exceeded"),
        ("d.parquet", "PAR", "expected a Parquet file, got"),
        ("d.jsonl.gz", "{}", "expected a gzip file, got"),
        ("d.json", '{"train": [], "test": []}', "expected at least one usable conversation, got no rows"),
        ("d.json", '{"test": []}', "expected one of test, got 'train'"),
        ("d.csv", "a,b", r"expected a file ending in .json, .jsonl, .ndjson, .parquet .*, got '.csv'"),
    ],
)
def test_files_that_are_no_chat_data_get_one_sentence(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_conversations(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_lines_in_a_json_file_are_read_as_lines(tmp_path):
    as_jsonl(tmp_path / "data.json", [SHAREGPT, MESSAGES])
    assert len(load_conversations(tmp_path / "data.json")) == 2


def test_bytes_that_are_no_text_are_said(tmp_path):
    (tmp_path / "d.json").write_bytes(b'["\xff"]')
    with pytest.raises(InputError, match="expected UTF-8 text, got another byte at 2"):
        load_conversations(tmp_path / "d.json")


def test_parquet_whose_text_is_no_text_is_said(tmp_path):
    column = pa.array([b"a\xff"]).view(pa.string())
    parquet.write_table(pa.table({"prompt": column, "completion": column}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match="expected a Parquet file, got 'utf-8' codec"):
        load_conversations(tmp_path / "d.parquet")


@pytest.mark.parametrize(("write", "file"), [(as_saved, "state.json"), (as_splits, "dataset_dict.json")])
@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_saved_data_set_is_said(tmp_path, write, file, text):
    write(tmp_path / "d", [MESSAGES])
    (tmp_path / "d" / file).write_text(text)
    with pytest.raises(InputError, match=r"d: expected .* written by save_to_disk, got .*. Save it again.") as caught:
        load_conversations(tmp_path / "d")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "data for '': expected a file, glob, directory or Hub name, got an empty name"),
        (["", "x.json"], "got an empty name"),
        (None, "expected a file, glob, directory or Hub name, or rows, got NoneType"),
        (3, "or rows, got int"),
        (MESSAGES, "expected a list of rows, got a single one. Put it into a list."),
    ],
)
def test_data_that_is_no_data_is_said(data, message):
    with pytest.raises(InputError, match=message):
        load_conversations(data)


@pytest.mark.parametrize("name", ["missing.json", "./missing", "/nowhere/missing"])
def test_missing_files_are_said(name):
    with pytest.raises(InputError, match="got nothing there"):
        load_conversations(name)


def test_missing_splits_are_said(tmp_path):
    as_splits(tmp_path / "s", [MESSAGES])
    with pytest.raises(InputError, match="expected one of train, got 'test'"):
        load_conversations(tmp_path / "s", split="test")


def test_directory_of_no_data_is_said(tmp_path):
    with pytest.raises(InputError, match="got none of them"):
        load_conversations(tmp_path)


def test_unknown_hub_name_is_said():
    with pytest.raises(InputError, match=r"data for nobody/no-such-data: expected a file, directory or Hub dataset"):
        load_conversations("nobody/no-such-data")


def test_alpaca_rows_and_zstd_files_are_read(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Go.", "output": "gone"},
        {"instruction": 3, "input": "x", "output": "y"},
        {"instruction": "Sum.", "input": {"a": 1}, "output": "1"},
    ]
    with pa.output_stream(str(tmp_path / "d.jsonl.zst"), compression="zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    found, report = read_conversations(str(tmp_path / "d.jsonl.zst"))
    assert [one.messages[0]["content"] for one in found] == ["Add.\n\n1 2", "Say hi.", "Go."]
    assert [one.messages[1]["content"] for one in found] == ["3", "hi", "gone"]
    assert [entry["reason"] for entry in report.skipped] == ["not_text"] * 2
    (tmp_path / "bad.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(InputError, match=r"bad.jsonl.zst: expected a zstd file, got "):
        read_conversations(str(tmp_path / "bad.jsonl.zst"))


def test_alpacas_history_is_the_turns_before():
    history = [["Hi.", "Hello."], ("And?", "Well.")]
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": history, "system": "Be brief."}
    none, bad = [None, [], "", float("nan")], [[["alone"]], 3, "before"]
    found, report = read_conversations([{**row, "history": each} for each in (history, *none, *bad)])
    assert [[m["content"] for m in one.messages] for one in found] == [
        ["Be brief.", "Hi.", "Hello.", "And?", "Well.", "Add.\n\n1 2", "3"],
        *[["Be brief.", "Add.\n\n1 2", "3"]] * len(none),
    ]
    assert [(e["reason"], e["detail"]) for e in report.skipped] == [
        ("not_chat", f"history: expected pairs of question and answer, got {each!r}") for each in bad
    ]


@pytest.mark.parametrize("seed", [-1, 0.5])
def test_a_shuffle_seed_that_is_none_is_refused(seed):
    with pytest.raises(InputError, match=f"shuffle_seed for chat data: expected an integer from 0, got {seed}"):
        read_conversations([], shuffle_seed=seed)


def test_a_shuffled_part_is_drawn_from_all(tmp_path):
    rows = [{"id": f"c{n}", "prompt": f"say {n}", "completion": f"{n}"} for n in range(50)]
    names = [one.id for one in read_conversations(rows, limit=10, shuffle_seed=3)[0]]
    assert names == [one.id for one in read_conversations(rows, limit=10, shuffle_seed=3)[0]]
    assert names != [one.id for one in read_conversations(rows, limit=10, shuffle_seed=4)[0]]
    assert len(set(names)) == 10
    assert max(int(name[1:]) for name in names) > 10


def test_a_configuration_of_a_hub_data_set_is_named_behind_it(monkeypatch):
    asked = []

    def load(name, configuration=None, split=None, streaming=False):
        asked.append((name, configuration, split))
        assert not streaming
        return [{"prompt": "a", "completion": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("org/data", "org/data:main"):
        found, report = read_conversations(name)
        assert len(found) == 1
        assert report.data == [name]
    assert asked == [("org/data", None, "train"), ("org/data", "main", "train")]
    assert hub_data(["org/data:main", "org/data", "mine.json"]) == ["org/data"]
