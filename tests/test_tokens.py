"""Bytes and spans of tokens on real tokenizers: text in, the same bytes out, whatever the text."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import load_fast_tokenizer
from fusechat_fuse.text.spans import token_spans
from fusechat_fuse.text.tokens import same_vocabulary, token_table, tokenizer_hash
from tests.helpers.random_texts import random_texts

pytestmark = pytest.mark.slow

REAL = ("openchat", "qwen", "llama3")
ALL = (*REAL, "tiny_bpe", "tiny_unigram")
TEXTS = (
    "",
    "Hello",
    "The quick brown fox.\n\n\n\tdef f(x):\r\n    return 'it''s'  \n",
    "   leading, trailing   and     runs  ",
    "你好,世界 – naïve café ½ № ﬁ 👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u00a0x",
    "a▁b ▁▁ c ▁",
    "▁▁start",
    "\n",
    " ",
    "\x00\x7f\ufeff end\u2028",
    "1234567890 3.14159 0xDEADBEEF",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 5,
)


def check(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start, end = token_spans(tokenizer, text, ids)
    raw, table = text.encode(), token_table(tokenizer).bytes
    assert start.dtype == end.dtype == np.int32
    assert len(start) == len(ids)
    assert (start <= end).all()
    if len(ids):
        assert start[0] == 0
        assert end[-1] == len(raw)
    assert (start[1:] == end[:-1]).all()  # no hole, no overlap
    for i, s, e in zip(ids, start, end):
        spelled = raw[s:e].replace("▁".encode(), b" ") if "▁" in text else raw[s:e]
        own = table[i].replace("▁".encode(), b" ")
        assert own == spelled or own == b" " + spelled, (own, spelled)


@pytest.mark.parametrize("name", ALL)
def test_spans_add_up_to_the_text(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in (*TEXTS, *random_texts(0, 150)):
        check(tokenizer, text)


def test_bytes_of_known_tokens(openchat, qwen, llama3):
    b = token_table(openchat).bytes
    assert len(b) == len(openchat) == 32002
    assert b[openchat.convert_tokens_to_ids("▁the")] == b" the"
    assert b[openchat.convert_tokens_to_ids("<0x0A>")] == b"\n"
    assert [b[i] for i in (0, 1, 2, 32000, 32001)] == [None] * 5
    b = token_table(qwen).bytes
    assert len(b) == 151646
    assert b[qwen.convert_tokens_to_ids("Ġthe")] == b" the"
    assert b[qwen("你", add_special_tokens=False).input_ids[0]] == "你".encode()
    assert b[qwen.convert_tokens_to_ids("<|im_end|>")] is None
    invalid = {}
    for name, tokenizer in (("openchat", openchat), ("qwen", qwen), ("llama3", llama3)):
        spelled = [piece for piece in token_table(tokenizer).bytes if piece]
        invalid[name] = sum(piece.decode(errors="ignore").encode() != piece for piece in spelled)
    assert invalid == {"openchat": 128, "qwen": 1448, "llama3": 1352}  # ids that are not valid UTF-8 by themselves
    seen = [piece for piece in token_table(openchat).bytes if piece is not None]
    assert len(seen) - len(set(seen)) == 125  # same bytes, two ids: '<0x41>' and 'A'


def test_inserted_mark_has_no_byte_and_literal_mark_has_three(openchat):
    text = "Hi<|end_of_turn|>the <s> end"
    ids = openchat(text, add_special_tokens=False).input_ids
    start, end = token_spans(openchat, text, ids)
    pieces = openchat.convert_ids_to_tokens(ids)
    spans = {piece: text.encode()[s:e].decode() for piece, s, e in zip(pieces, start, end)}
    assert spans["▁Hi"] == "Hi"
    assert spans["<|end_of_turn|>"] == "<|end_of_turn|>"
    assert spans["▁the"] == "the"  # the word after a special token keeps its '▁', which stands for no byte
    assert spans["<s>"] == "<s>"
    ids = openchat("a ▁ b", add_special_tokens=False).input_ids
    start, end = token_spans(openchat, "a ▁ b", ids)
    assert end[-1] == 7
    assert [int(e - s) for s, e in zip(start, end)] == [1, 4, 2]  # 'a', ' ▁' as '▁▁', ' b'


def test_added_bos_has_an_empty_span(openchat, llama3):
    for tokenizer in (openchat, llama3):
        ids = tokenizer("Hello there").input_ids
        start, end = token_spans(tokenizer, "Hello there", ids)
        assert (start[0], end[0]) == (0, 0)
        assert end[-1] == 11


def variant(openchat, **parts) -> PreTrainedTokenizerFast:
    data = json.loads(openchat.backend_tokenizer.to_str())
    data.update(parts)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), unk_token="<unk>")


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("split", [True, False])
def test_metaspace_variants(openchat, scheme, split):
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    tokenizer = variant(openchat, normalizer=None, pre_tokenizer=metaspace)
    for text in (*TEXTS, *random_texts(1, 60), "Hi<|end_of_turn|>there<|end_of_turn|> you <|end_of_turn|>\n"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        start, end = token_spans(tokenizer, text, ids)
        assert len(ids) == 0 or end[-1] == len(text.encode())
        assert (start[1:] == end[:-1]).all()


def test_gemma_like_added_tokens_and_stripping_ones():
    pieces = ["<unk>", "▁", "▁▁", "a", "b", "▁a", *(f"<0x{b:02X}>" for b in range(256))]
    backend = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, [("▁", "▁"), ("▁", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("▁▁", normalized=False)])
    backend.add_special_tokens([AddedToken("<end>", rstrip=True, normalized=False, special=True)])
    table = token_table(backend).bytes
    assert table[backend.token_to_id("\n\n")] == b"\n\n"
    assert table[backend.token_to_id("▁▁")] == b"  "
    assert table[backend.token_to_id("<end>")] is None
    text = "a  b\n\n▁▁a<end> \n a<end>b <end>"
    encoding = backend.encode(text)
    start, end = token_spans(backend, text, encoding.ids)
    spelled = [text.encode()[s:e].decode() for s, e in zip(start, end)]
    assert spelled == ["a", "  ", "b", "\n\n", "▁▁", "a", "<end>", "a", "<end>", "b", " ", "<end>"]


@pytest.mark.parametrize("text", ["e\u0301te\u0301 in two parts", "fine here, then \u212b"])
def test_text_that_is_not_nfc_is_refused_for_qwen(qwen, openchat, text):
    with pytest.raises(InputError, match="not in Unicode's NFC form"):
        token_spans(qwen, text, qwen(text, add_special_tokens=False).input_ids)
    check(openchat, text)


LOWER = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
LOWER["normalizers"].append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})


@pytest.mark.parametrize(
    ("normalizer", "text", "reason"),
    [(LOWER, "an Apple", "lower-cases"), ({"type": "NFKC"}, "ﬁne ½", "normalizer changes it")],
    ids=["lower", "nfkc"],
)
def test_normalizers_that_lose_bytes_are_refused(openchat, normalizer, text, reason):
    tokenizer = variant(openchat, normalizer=normalizer)
    with pytest.raises(InputError, match=reason):
        token_spans(tokenizer, text, tokenizer(text, add_special_tokens=False).input_ids)


@pytest.fixture
def words():
    """A WordPiece tokenizer, which loses blanks and what it has no word for."""
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##der": 2, "a": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words


def test_pieces_of_a_word_are_read_where_nothing_is_lost(words):
    start, end = token_spans(words, "under", words.encode("under").ids)
    assert list(zip(start.tolist(), end.tolist())) == [(0, 2), (2, 5)]


@pytest.mark.parametrize(
    ("text", "reason"), [("a under", "does not keep every byte"), ("zebra", "no token for a character")]
)
def test_pieces_that_lose_bytes_are_refused(words, text, reason):
    with pytest.raises(InputError, match=reason):
        token_spans(words, text, words.encode(text).ids)


@pytest.mark.parametrize(("text", "place"), [("some test", "at byte 4"), ("some text and more", "at byte 9")])
def test_wrong_ids_are_refused(qwen, text, place):
    ids = qwen("some text", add_special_tokens=False).input_ids
    with pytest.raises(InputError, match=place):
        token_spans(qwen, text, ids)


def test_bpe_dropout_is_switched_off(tiny_bpe, tmp_path, caplog):
    tiny_bpe.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_fast_tokenizer(tmp_path)
    text = "the quick brown fox " * 20
    assert {tuple(tokenizer(text).input_ids) for _ in range(5)} == {tuple(tiny_bpe(text).input_ids)}
    assert tokenizer_hash(tokenizer) == tokenizer_hash(tiny_bpe)
    assert "draws ids at random (BPE dropout): switched off" in caplog.text


def test_slow_tokenizers_are_refused():
    with pytest.raises(InputError, match="fast tokenizer"):
        token_table(object())


def test_hash_is_the_same_after_saving_and_for_another_template(tiny_bpe, openchat, tiny_unigram, tmp_path):
    for tokenizer in (tiny_bpe, openchat, tiny_unigram):
        known = tokenizer_hash(tokenizer)
        tokenizer.save_pretrained(tmp_path / known)
        again = PreTrainedTokenizerFast.from_pretrained(tmp_path / known)
        again.chat_template = "{{ messages }}"
        again.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        assert tokenizer_hash(again) == known
        assert tokenizer_hash(again.backend_tokenizer) == known
        again.add_tokens(["something new"])
        assert tokenizer_hash(again) != known
    assert len({tokenizer_hash(t) for t in (tiny_bpe, openchat, tiny_unigram)}) == 3


def test_same_vocabulary(openchat, qwen, llama3, tiny_bpe, tiny_unigram):
    data = json.loads(openchat.backend_tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < 3]
    data["normalizer"], data["pre_tokenizer"] = (
        None,
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    )
    mistral = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="</s>")
    assert len(mistral) == 32000
    assert same_vocabulary(openchat, mistral)
    assert same_vocabulary(mistral, openchat)
    tokenizers = (openchat, qwen, llama3, tiny_bpe, tiny_unigram)
    for a in tokenizers:
        for b in tokenizers:
            assert same_vocabulary(a, b) == (a is b)
    data["model"]["vocab"]["▁thx"] = data["model"]["vocab"].pop("▁the")
    data["model"]["merges"] = [
        m
        for m in data["model"]["merges"]
        if "▁the" not in (m if isinstance(m, list) else m.split())
        and "".join(m if isinstance(m, list) else m.split()) != "▁the"
    ]
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))
    assert not same_vocabulary(openchat, changed)
