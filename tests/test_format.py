"""docs/format.md is true: a reader written from it reads what we write, and its names are those on disk."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fusechat_fuse import align, combine, load_representation, represent
from fusechat_fuse.store.rows import encode_row
from fusechat_fuse.training.run import train
from tests.helpers.real_tokenizers import tiny_unigram
from tests.helpers.reference_format import read_store
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_runs import config, pivot_directory

DOCUMENT = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
KINDS = {"plain": "representation", "compact": "representation", "statistics": "aligned", "prefix": "aligned"}
KINDS |= {"min_ce": "combined", "avg_ce": "combined"}
CHATS = [
    {
        "id": f"c{n}",
        "slice": ["code", "chat", ""][n % 3],
        "messages": [
            {"role": "user", "content": f"say {n}"},
            {"role": "assistant", "content": f"the value {n} is wörld"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "x" * n},
        ],
    }
    for n in range(12)
]
CHATS += [{"id": "c0", "messages": CHATS[0]["messages"]}, {"id": "none", "messages": []}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One of each: representations in both encodings, aligned, combined, a target."""
    home = tmp_path_factory.mktemp("world")
    pivot, source = pivot_directory(home / "pivot"), home / "source"
    tiny_model("Mistral", seed=1, vocab_size=800).save_pretrained(source)
    tiny_unigram().save_pretrained(source)
    options = {"template": "native", "top_k": 5, "shard_size": 7}
    represent(pivot, CHATS, home / "plain", **options)
    represent(pivot, CHATS, home / "compact", encoding="compact", **options)
    represent(source, CHATS, home / "other", **options)
    for mapping in ("statistics", "prefix"):
        align(home / "compact", home / "other", home / mapping, mapping=mapping, cache_dir=home / "cache")
    for function in ("min_ce", "avg_ce"):
        combine([home / "statistics", home / "prefix"], home / function, function=function)
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    train(pivot, home / "min_ce", config(home / "target", **settings))
    return home


def tables(heading: str) -> list[list[str]]:
    """The cells of every row of the tables between a heading and the next one."""
    level = heading.split(" ")[0]
    section = DOCUMENT.split(f"\n{heading}\n", 1)[1]
    section = re.split(rf"\n#{{1,{len(level)}}} ", section)[0]
    lines = [line for line in section.split("\n") if line.startswith("| ") and not line.startswith("|---")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0].startswith("`")]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def entries(value, prefix: str = "") -> dict:
    """Nested objects and lists of objects as one, names joined by dots."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(n): item for n, item in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {name: leaf for key, item in value.items() for name, leaf in entries(item, f"{prefix}{key}.").items()}


def assert_documented(found: set[str], documented: set[str]) -> None:
    """Every name found fits an entry of the document, and every entry has a name found."""

    def pattern(entry: str) -> str:  # a last * stands for whatever is below it
        below = r"(\..+)?" if entry.endswith("*") else ""
        return re.escape(entry).replace(r"\*", "[^.]+") + below

    fits = {name: {entry for entry in documented if re.fullmatch(pattern(entry), name)} for name in found}
    assert [name for name, fitting in fits.items() if not fitting] == []
    assert documented - set().union(*fits.values()) == set()


@pytest.mark.parametrize("name", KINDS)
def test_reader_written_from_the_document_reads_the_same(world, name):
    rows, stored = read_store(world / name), load_representation(world / name)
    assert [row["id"] for row in rows] == stored.ids
    for read, row in zip(rows, stored):
        if "source_ids" in read:
            probs = np.exp(np.array(read.pop("source_logprobs"), np.float32))
            np.testing.assert_allclose(row.pop("source_probs"), probs, rtol=1e-6)
        assert read.keys() == row.keys()
        for key, value in row.items():
            np.testing.assert_array_equal(value, np.array(read[key]) if isinstance(value, np.ndarray) else read[key])


@pytest.mark.parametrize("name", KINDS)
def test_fields_and_their_types_are_the_documents(world, name):
    headings = {"plain": ["every row", "the encoding `plain`"], "compact": ["every row", "the encoding `compact`"]}
    wanted = headings.get(name, ["every row", "the encoding `plain`", "a source"])
    documented = {named(row[0])[0]: row[1] for part in wanted for row in tables(f"### Fields of {part}")}
    optional = {"source_index": KINDS[name] == "combined"}
    optional |= dict.fromkeys(("source_log_weight", "source_best_ce"), name == "avg_ce")
    optional["label_tail"] = name != "avg_ce"
    documented = {field: kind for field, kind in documented.items() if optional.get(field, True)}
    file = world / name / "shard-00000.arrow"
    schema = pa.ipc.open_stream(pa.memory_map(str(file))).schema
    assert {field.name: str(field.type) for field in schema} == documented
    assert schema.names == ["id", *sorted(set(documented) - {"id"})]


def test_the_example_is_what_is_written():
    row = {
        "id": "example",
        "input_ids": [1, 5, 300, 70000, 2],
        "predicted": [2, 3, 4],
        "message": [1, 1, 1],
        "start": [0, 3, 6],
        "end": [2, 6, 7],
        "topk_ids": np.array([[300, 7], [70000, 300], [2, 1]]),
        "topk_logprobs": np.array([[-0.5, -1], [-0.25, -3], [0, -2]]),
        "ce": np.array([0.5, 0.25, 2]),
        "source_ids": np.array([[300, 7, -1], [-1, -1, -1], [2, -1, -1]]),
        "source_probs": np.array([[0.5, 0.25, 0], [0, 0, 0], [1, 0, 0]]),
        "source_token_ce": [0.7, np.inf, 0],
        "mapped_mass": [0.75, 0, 1],
        "label_tail": [1.25, 0, -1],
        "source_index": [1],
    }
    fields = encode_row(row, "plain") | encode_row(row, "compact")
    written = {name: value for name, value in fields.items() if isinstance(value, bytes)}
    for name in [name for name in written if name.startswith("c_")]:
        size = int.from_bytes(written[name][:4], "little")
        written[name] = pa.decompress(written[name][4:], decompressed_size=size, codec="zstd", asbytes=True)
    assert {named(cells[0])[0]: bytes.fromhex(cells[1]) for cells in tables("### An example")} == written


@pytest.mark.parametrize("name", KINDS)
def test_a_row_as_it_is_read_has_the_documents_names_and_dtypes(world, name):
    row = load_representation(world / name)[0]
    sizes = {"T": len(row["input_ids"]), "P": len(row["ce"]), "K": 5, "1": 1}
    sizes["K'"] = row["source_ids"].shape[1] if "source_ids" in row else 0
    documented = {
        named(cells[0])[0]: (cells[1], tuple(sizes[letter] for letter in cells[2].split(" ")))
        for cells in tables("## A row as it is read")
        if ("every row" in cells[3] or KINDS[name] in cells[3]) and f"none of `{name}`" not in cells[3]
    }
    arrays = {key: value for key, value in row.items() if isinstance(value, np.ndarray)}
    assert {key: (value.dtype.name, value.shape) for key, value in arrays.items()} == documented


@pytest.mark.parametrize("file", ["identity.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["representation", "aligned", "combined"])
def test_entries_of_json_files_are_the_documents(world, file, kind):
    rows = tables(f"### {file}")
    documented = {named(cells[0])[0] for cells in rows if "every store" in cells[1] or kind in cells[1]}
    contents = [json.loads((world / name / file).read_text()) for name in KINDS if KINDS[name] == kind]
    assert_documented({entry for content in contents for entry in entries(content)}, documented)


def test_entries_of_a_shards_json_are_the_documents(world):
    documented = {named(cells[0])[0] for cells in tables("### shard-N.json")}
    assert_documented(set(entries(json.loads((world / "plain" / "shard-00000.json").read_text()))), documented)


def test_files_of_a_store_are_the_documents(world):
    documented = {re.sub(r"\d{5}", "N", entry) for cells in tables("## A store directory") for entry in named(cells[0])}
    found = set()
    for name in KINDS:
        for path in (world / name).iterdir():
            found.add(re.sub(r"\d{5}", "N", path.name + "/" * path.is_dir()))
    assert found == documented


def test_a_line_of_skipped_conversations_is_the_documents(world):
    described = DOCUMENT.split("### skipped.jsonl", 1)[1].split("###")[0].split("Empty")[0]
    lines = [json.loads(line) for line in (world / "plain" / "skipped.jsonl").read_text().splitlines()]
    assert {line["action"] for line in lines} == {"skipped", "repaired"}
    for line in lines:
        assert list(line) == sorted(named(described))


def test_counted_pairs_are_the_documents(world):
    from safetensors import safe_open

    with safe_open(world / "statistics" / "counts.safetensors", framework="numpy") as tensors:
        found = {*tensors.keys(), *tensors.metadata(), *json.loads(tensors.metadata()["about"])}
    assert found == set(named(DOCUMENT.split("### counts.safetensors", 1)[1].split("##")[0]))


def test_a_training_run_is_the_documents(world):
    rows = tables("## A training run directory")
    files, inside = [cells for cells in rows if len(cells) == 3], [cells for cells in rows if len(cells) == 2]
    run = json.loads((world / "target" / "fusion_run.json").read_text())
    assert run["finished"]
    assert_documented(set(entries(run)), {named(cells[0])[0] for cells in inside})
    pattern = [re.escape(entry).replace(r"\*", ".*").replace("N/", r"\d+/") for f in files for entry in named(f[0])]
    copied = {path.name for path in (world / "pivot").iterdir()} - {"config.json", "model.safetensors"}
    for path in (world / "target").iterdir():
        known = any(re.fullmatch(p, path.name + "/" * path.is_dir()) for p in pattern)
        assert known or path.name in copied, path.name
