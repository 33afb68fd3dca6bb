"""Chat data of every shape becomes one; what is not usable is skipped by rule, counted, and named when asked."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from fusechat_fuse.errors import InputError
from fusechat_fuse.text.conversations import content_hash, load_conversations, read_conversations

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
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, ANSWER]},
        {"messages": [{"content": "no role"}, ANSWER]},
        {"messages": ["x", ANSWER]},
        {"prompt": 3, "completion": "x"},
    ],
    "lone_surrogate": [{"messages": [{"role": "user", "content": "a\ud800b"}, ANSWER]}],
    "unknown_role": [{"messages": [{"role": "tool", "content": "x"}, ANSWER]}],
    "system_not_first": [
        {"messages": [USER, ANSWER, SYSTEM, USER, ANSWER]},
        {"messages": [SYSTEM, SYSTEM, USER, ANSWER]},
    ],
    "repeated_role": [{"messages": [USER, USER, ANSWER]}, {"messages": [USER, ANSWER, ANSWER]}],
    "no_answer": [{"messages": [USER]}, {"messages": [SYSTEM]}, {"messages": [ANSWER]}, {"messages": [ANSWER, USER]}],
}
REPAIRED = {
    "leading_assistant": ({"messages": [SYSTEM, ANSWER, ANSWER, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "trailing_user": ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER]),
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
    with pytest.raises(InputError, match=rf"data.jsonl, row 1: .*\({reason}\). Mend the row") as caught:
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
    assert report.counts() == {"rows": 1, "skipped": {}, "repaired": {}}


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
        ("d.jsonl", '{"messages": []}\n{"mess', r"d.jsonl, line 2: expected JSON, got .* Mend the line."),
        ("d.jsonl", "\x00", r"d.jsonl, line 1: expected JSON"),
        ("d.parquet", "PAR", "expected a Parquet file, got"),
        ("d.csv", "a,b", r"expected a file ending in .json, .jsonl, .parquet, got '.csv'"),
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
    with pytest.raises(InputError, match="expected UTF-8 text, got byte 2 that is none"):
        load_conversations(tmp_path / "d.json")


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
