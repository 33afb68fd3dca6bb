"""Paths: pivot tokens that spell bytes in mid-text, and the table that holds them."""

import numpy as np
import pytest

from fusechat_fuse.alignment.paths import PathTable
from fusechat_fuse.alignment.speller import Speller
from fusechat_fuse.text.tokens import token_table


def test_paths_in_mid_text(openchat, qwen, llama3, tiny_unigram):
    name = openchat.convert_tokens_to_ids
    paths = Speller(openchat).paths([b" the", b"the", b"  x", b"\n\n", b"", " 你".encode()])
    assert paths[0] == [name("▁the")]
    assert paths[1] == [name("the")]
    assert paths[2] == [name("▁"), name("▁x")]
    assert paths[3] == [name("<0x0A>")] * 2
    assert paths[4] == []
    assert paths[5] == [name("▁"), name("你")]
    for tokenizer in (qwen, llama3):
        assert Speller(tokenizer).paths([b" the", b"the"]) == [
            tokenizer(text, add_special_tokens=False).input_ids for text in (" the", "the")
        ]
    name = tiny_unigram.convert_tokens_to_ids
    assert Speller(tiny_unigram).paths([b" the", b"the"])[0] == [name("▁the")]
    assert Speller(tiny_unigram).paths([b"the"])[0][0] != name("▁the")


def test_paths_of_bytes_that_are_no_characters(openchat, qwen):
    name = openchat.convert_tokens_to_ids
    cut = "你".encode()
    speller = Speller(openchat)
    assert speller.paths([cut[1:] + b" the"])[0] == [name("<0xBD>"), name("<0xA0>"), name("▁the")]
    assert speller.paths([b" the" + cut[:2]])[0] == [name("▁the")]  # stops before the unfinished character
    assert speller.paths([cut[:1]])[0] == []
    speller = Speller(qwen)
    path = speller.paths([b" " + cut[:2]])[0]
    assert b"".join(speller.bytes[i] for i in path) == b" " + cut[:2]  # merges run on the raw bytes
    path = speller.paths([cut[1:] + b" the"])[0]
    assert [speller.bytes[i] for i in path] == [cut[1:2], cut[2:], b" the"]


def test_special_content_is_ordinary_text_in_a_path(qwen, openchat):
    for tokenizer, content in ((qwen, "<|im_end|>"), (openchat, "<|end_of_turn|>"), (openchat, "</s>")):
        speller = Speller(tokenizer)
        path = speller.paths([content.encode()])[0]
        assert tokenizer.convert_tokens_to_ids(content) not in path
        assert b"".join(speller.bytes[i] for i in path) == content.encode()


@pytest.mark.parametrize("pivot", ["openchat", "qwen", "tiny_bpe", "tiny_unigram"])
def test_paths_spell_their_bytes(pivot, request, llama3):
    speller = Speller(request.getfixturevalue(pivot))
    pieces = [piece for piece in token_table(llama3).bytes[::41] if piece]
    whole = 0
    for piece, path in zip(pieces, speller.paths(pieces)):
        spelled = b"".join(speller.bytes[i] for i in path)
        assert piece.startswith(spelled)
        whole += spelled == piece
    assert whole > 0.98 * len(pieces)


def test_path_table_is_ragged_and_grows():
    table = PathTable.of([[5, 6], [], [7]])
    rows = np.array([[0, 1], [2, 0]])
    assert table.at(rows, 0).tolist() == [[5, -1], [7, 5]]
    assert table.at(rows, 1).tolist() == [[6, -1], [-1, 6]]
    assert table.extend([[8, 9, 10], []]) == 3
    assert [table.path(row) for row in range(5)] == [[5, 6], [], [7], [8, 9, 10], []]
    assert table.at(np.array([3, 4]), 2).tolist() == [10, -1]
    assert PathTable.of([]).extend([[1]]) == 0


def test_rows_of_a_path_table_can_be_replaced():
    table = PathTable.of([[5, 6], [], [7]])
    table.replace({2: [8, 9, 10], 0: []})
    table.extend([[4]])
    assert [table.path(row) for row in range(4)] == [[], [], [8, 9, 10], [4]]
    assert table.at(np.arange(4), 0).tolist() == [-1, -1, 8, 4]
    table.replace({})
    assert len(table) == 4


def test_a_path_table_from_its_stored_arrays():
    table = PathTable.of([[5, 6], [], [7]])
    again = PathTable(table.flat.astype(np.int64), np.append(table.length, 0))
    assert [again.path(row) for row in range(4)] == [[5, 6], [], [7], []]
    assert again.first.tolist() == [5, -1, 7, -1]
