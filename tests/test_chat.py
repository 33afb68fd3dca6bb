"""Messages to ids: the published formats, contents found by construction, nothing that becomes a special token."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fusechat_fuse.errors import InputError
from fusechat_fuse.text import layout
from fusechat_fuse.text.built_in_templates import BUILT_IN
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.spans import token_spans
from fusechat_fuse.text.templates import bos_of, check_template, end_of_turn_of, native_template, resolve_template
from tests.helpers.encoding import encode_conversation
from tests.helpers.real_tokenizers import tiny_bpe
from tests.helpers.reference_represent import spans_by_offsets

SINGLE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]
MULTI = [
    *SINGLE,
    {"role": "user", "content": "How are you today?"},
    {"role": "assistant", "content": "Fine, thank you."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
# the published formats, written out by hand: (one turn, what a second turn adds, one turn after a system message)
EXPECTED = {
    "openchat_3.5": (
        "<s>GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant: Hi there.<|end_of_turn|>",
        "GPT4 Correct User: How are you today?<|end_of_turn|>GPT4 Correct Assistant: Fine, thank you.<|end_of_turn|>",
        "<s>GPT4 Correct System: Be brief.<|end_of_turn|>GPT4 Correct User: Hello<|end_of_turn|>"
        "GPT4 Correct Assistant: Hi there.<|end_of_turn|>",
    ),
    "mistral": (
        "<s>[INST] Hello [/INST] Hi there.</s>",
        "[INST] How are you today? [/INST] Fine, thank you.</s>",
        "<s>[INST] Be brief.\n\nHello [/INST] Hi there.</s>",
    ),
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nHow are you today?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nFine, thank you.<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there.<|eot_id|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi there.<end_of_turn>\n",
        "<start_of_turn>user\nHow are you today?<end_of_turn>\n<start_of_turn>model\nFine, thank you.<end_of_turn>\n",
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi there.<end_of_turn>\n",
    ),
    "phi-3": (
        "<s><|user|>\nHello<|end|>\n<|assistant|>\nHi there.<|end|>\n",
        "<|user|>\nHow are you today?<|end|>\n<|assistant|>\nFine, thank you.<|end|>\n",
        "<s><|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi there.<|end|>\n",
    ),
    "internlm2": (
        "<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n",
        "<|im_start|>user\nHow are you today?<|im_end|>\n<|im_start|>assistant\nFine, thank you.<|im_end|>\n",
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi there.<|im_end|>\n",
    ),
    "yi": (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n",
        "<|im_start|>user\nHow are you today?<|im_end|>\n<|im_start|>assistant\nFine, thank you.<|im_end|>\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi there.<|im_end|>\n",
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there.<|im_end|>\n",
        "<|im_start|>user\nHow are you today?<|im_end|>\n<|im_start|>assistant\nFine, thank you.<|im_end|>\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi there.<|im_end|>\n",
    ),
}
FAMILIES = list(EXPECTED)


def stand_in(family, chat_template=None):
    """A byte-level tokenizer with the special tokens of a family, and no template unless given."""
    marks = {
        "openchat_3.5": ["<s>", "</s>", "<|end_of_turn|>"],
        "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
        "llama-3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "phi-3": ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "internlm2": ["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        "yi": ["<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    }[family]
    data = json.loads(tiny_bpe().backend_tokenizer.to_str())
    data["added_tokens"] = []
    for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        data["model"]["vocab"][f"unused{data['model']['vocab'].pop(name)}"] = len(data["model"]["vocab"])
    data["model"]["vocab"] = {piece: i for i, piece in enumerate(data["model"]["vocab"])}
    backend = Tokenizer.from_str(json.dumps(data))
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    special = {"bos_token": BUILT_IN[family].bos} if BUILT_IN[family].bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=BUILT_IN[family].end_of_turn, chat_template=chat_template, **special
    )


def check(tokenizer, messages, encoded, trimmed=False):
    """What must hold of any encoding: spans tile the contents, end with the end of turn, and the bytes agree."""
    assert (np.diff(encoded.predicted) > 0).all()
    assert encoded.predicted.min() > 0
    assert {a.dtype.name for a in (encoded.input_ids, encoded.predicted, encoded.start, encoded.end)} == {"int32"}
    assert encoded.message.dtype == np.int16
    assert [m for n, m in enumerate(encoded.message) if n == 0 or m != encoded.message[n - 1]] == [
        n for n, message in enumerate(messages) if message["role"] == "assistant"
    ]
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        raw = message["content"].encode()
        spans = [(int(s), int(e)) for s, e, m in zip(encoded.start, encoded.end, encoded.message) if m == n]
        assert spans[-1] == (len(raw), len(raw) + 1)
        assert tokenizer.convert_ids_to_tokens(
            int(encoded.input_ids[encoded.predicted[encoded.message == n][-1]])
        ) == end_of_turn_of(tokenizer)
        kept = raw.strip() if trimmed else raw
        lead = len(raw) - len(raw.lstrip()) if trimmed else 0
        position = lead
        for start, end in spans[:-1]:
            assert start == position
            assert end >= start
            position = end
        assert position == lead + len(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_built_in_templates_are_the_published_formats(family):
    template = resolve_template(family, stand_in(family))
    one, more, system = EXPECTED[family]
    assert template.render(SINGLE) == one
    assert template.render(MULTI) == one + more
    assert template.render(SYSTEM + SINGLE) == system
    assert template.render(SYSTEM + MULTI) == system + more


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("messages", [SINGLE, MULTI, SYSTEM + SINGLE, SYSTEM + MULTI], ids=["one", "two", "s1", "s2"])
def test_every_family_without_a_template_of_its_own(family, messages):
    tokenizer = stand_in(family)
    encoder = ConversationEncoder(tokenizer, "native")
    assert encoder.template.source == BUILT_IN[family].source
    encoded = encoder.encode(messages)
    one, more, system = EXPECTED[family]
    text = (system if messages[0]["role"] == "system" else one) + (more if len(messages) > 3 else "")
    assert list(encoded.input_ids) == tokenizer(text, add_special_tokens=False).input_ids
    check(tokenizer, messages, encoded)
    # every mark of the family is one token, and contents are where plain search finds them
    blanks = family in ("openchat_3.5", "mistral")  # the model writes the blank before its answer
    places = [
        (n, text.index(m["content"]) - blanks, text.index(m["content"]), text.index(m["content"]) + len(m["content"]))
        for n, m in enumerate(messages)
        if m["role"] == "assistant"
    ]
    expected = spans_by_offsets(tokenizer, text, places)
    end_of_turn = encoded.end - encoded.start == 1
    end_of_turn &= encoded.input_ids[encoded.predicted] == tokenizer.eos_token_id
    got = zip(*(a[~end_of_turn].tolist() for a in (encoded.predicted, encoded.message, encoded.start, encoded.end)))
    assert list(got) == expected


@pytest.mark.parametrize("name", ["openchat", "qwen", "llama3", "tiny_bpe", "tiny_unigram"])
@pytest.mark.parametrize("template", ["native", *FAMILIES])
def test_contents_of_all_kinds_on_real_tokenizers_with_every_template(name, template, request):
    tokenizer = request.getfixturevalue(name)
    encoder = ConversationEncoder(tokenizer, template)
    answers = [
        "",
        "Hi",
        "  two before, two after  ",
        "\n\tcode:\n    return 1\n",
        "naïve wörld 你好，世界 🙂👩‍👩‍👧 العربية",
        "▁ a literal mark ▁▁",
        "GPT4 Correct User: user assistant [INST] <|im_sta",
        " ",
        "1234567890 " * 3,
    ]
    messages = [m for a in answers for m in ({"role": "user", "content": a[::-1]}, {"role": "assistant", "content": a})]
    messages = SYSTEM + messages
    encoded = encoder.encode(messages)
    trimmed = "| trim" in encoder.template.source
    check(tokenizer, messages, encoded, trimmed)
    # read back: each predicted token's own bytes are its span of the content
    for t, message, start, end in zip(encoded.predicted, encoded.message, encoded.start, encoded.end):
        raw = messages[message]["content"].encode()
        piece = tokenizer.decode([int(encoded.input_ids[t])])
        if end <= len(raw) and "�" not in piece and "▁" not in messages[message]["content"]:
            span = raw[start:end].decode()
            assert span.strip() == piece.strip() if start > 0 and end < len(raw) else span.strip() in piece


def test_ids_of_the_model_card_single_and_multi_turn(openchat):
    user, assistant = [420, 6316, 28781, 3198, 3123, 1247, 28747], [420, 6316, 28781, 3198, 3123, 21631, 28747]
    one = [1, *user, 22557, 32000, *assistant]
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "How are you today?"},
        {"role": "assistant", "content": "Hi"},
    ]
    two = [*one, 15359, 32000, *user, 1602, 460, 368, 3154, 28804, 32000, *assistant]
    assert openchat("GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant:").input_ids == one
    for template in ("native", "pivot", "openchat_3.5"):
        encoder = ConversationEncoder(openchat, template)
        assert list(encoder.encode(messages[:2]).input_ids) == [*one, 15359, 32000]
        multi = encoder.encode(messages)
        assert list(multi.input_ids) == [*two, 15359, 32000]
        assert list(multi.predicted) == [len(one), len(one) + 1, len(two), len(two) + 1]
        assert list(zip(multi.message, multi.start, multi.end)) == [(1, 0, 2), (1, 2, 3), (3, 0, 2), (3, 2, 3)]


@pytest.mark.parametrize("name", ["openchat", "qwen", "llama3"])
def test_predicted_tokens_are_those_of_the_authors_labels(name, request):
    """FuseAI's own ids and labels of 14 conversations, OpenChat's template: equal but where a rule refuses one."""
    encoder = ConversationEncoder(request.getfixturevalue(name), "openchat_3.5")
    recorded = json.loads((Path(__file__).parent / "golden" / "inputs.json").read_text())[name]
    refused = []
    for sample, row in recorded.items():
        answers = row["text"].count("GPT4 Correct Assistant:")
        messages = encoder.parse(encoder.bos + row["text"], ("user", "assistant") * answers)
        try:
            encoded = encoder.encode(messages)
        except Unusable as problem:
            refused.append((sample, problem.reason))
            continue
        assert encoded.input_ids.tolist() == row["input_ids"]
        assert encoded.predicted.tolist() == np.flatnonzero(np.array(row["labels"]) != -100).tolist(), sample
    assert refused == {"openchat": [("p12_multiturn", "special_token")], "qwen": [("p08_unicode", "bytes")]}.get(
        name, []
    )


ASSISTANT = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] }}"
    "{{ '</s>' if m['role'] == 'assistant' else '\n' }}"
)
LLAMA_2 = (  # a blank on either side of an answer
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TRIMS = LLAMA_2.replace("m['content'] + ' ' +", "(m['content'] | trim) + ' ' +")
THINK_PROMPT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}"
)
FILLS_IN = (
    "{% for m in messages %}{{ m['role'] + ':' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') }}"
    "{{ m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
PROMPT = "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        ("openchat_3.5", "42", [("▁", 0, 0), ("4", 0, 1), ("2", 1, 2), ("<|end_of_turn|>", 2, 3)]),
        ("openchat_3.5", "Hi", [("▁Hi", 0, 2), ("<|end_of_turn|>", 2, 3)]),
        ("openchat_3.5", "", [("▁", 0, 0), ("<|end_of_turn|>", 0, 1)]),
        (ASSISTANT + PROMPT, "42", [("▁", 0, 0), ("4", 0, 1), ("2", 1, 2), ("</s>", 2, 3)]),
        (LLAMA_2, "A.", [("▁A", 0, 1), (".", 1, 2), ("▁", 2, 2), ("</s>", 2, 3)]),
        (LLAMA_2, "42", [("▁", 0, 0), ("4", 0, 1), ("2", 1, 2), ("▁", 2, 2), ("</s>", 2, 3)]),
        (TRIMS, "\n4\n", [("▁", 0, 0), ("4", 1, 2), ("▁", 3, 3), ("</s>", 3, 4)]),
        (THINK_PROMPT, "42", [("4", 0, 1), ("2", 1, 2), ("</s>", 2, 3)]),  # the prompt is no beginning of the text
        (FILLS_IN, "42", [("4", 0, 1), ("2", 1, 2), ("</s>", 2, 3)]),  # the template writes more than blanks
        (ASSISTANT + "{% endfor %}", "42", [("4", 0, 1), ("2", 1, 2), ("</s>", 2, 3)]),  # no generation prompt
    ],
    ids=["openchat", "letter", "empty", "vicuna", "llama-2", "llama-2 both", "trimmed", "think", "fills in", "none"],
)  # fmt: skip
def test_what_the_model_must_generate_is_predicted(source, content, expected, openchat):
    tokenizer = openchat
    if source != "openchat_3.5":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=openchat.backend_tokenizer, bos_token="<s>", eos_token="</s>", chat_template=source
        )
    for messages in ([SINGLE[0]], [*MULTI[:3]]):
        encoder = ConversationEncoder(tokenizer, "native")
        encoded = encoder.encode([*messages, {"role": "assistant", "content": content}])
        mine = encoded.message == len(messages)
        pieces = tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.predicted[mine]].tolist())
        assert list(zip(pieces, encoded.start[mine].tolist(), encoded.end[mine].tolist())) == expected


def test_token_that_straddles_header_and_content_is_clipped(openchat, llama3):
    # openchat: '▁Hi' holds the header's blank; llama-3 in openchat's template: 'ĠHi' likewise
    for tokenizer, piece in ((openchat, "▁Hi"), (llama3, "ĠHi")):
        encoded = encode_conversation(tokenizer, SINGLE, "openchat_3.5")
        first = encoded.predicted[0]
        assert tokenizer.convert_ids_to_tokens(int(encoded.input_ids[first])) == piece
        assert (encoded.start[0], encoded.end[0]) == (0, 2)


def test_trimming_template_keeps_offsets_into_the_original_content(llama3):
    messages = [SINGLE[0], {"role": "assistant", "content": " \n é!  \t"}]
    encoded = encode_conversation(llama3, messages, "native")
    text = llama3.decode(encoded.input_ids)
    assert text.endswith("\n\né!<|eot_id|>")
    assert (encoded.start[0], encoded.end[-2]) == (3, 6)  # é is two bytes
    assert (encoded.start[-1], encoded.end[-1]) == (9, 10)  # the end of turn stands at the original length


@pytest.mark.parametrize("side", ["lstrip", "rstrip", "strip"])
def test_template_that_takes_line_ends_off_the_last_answer_keeps_it(side):
    body = BODY.replace("m['content']", f"(m['content'].{side}('\\n') if loop.last else m['content'])")
    tokenizer = stand_in("qwen", "{% for m in messages %}" + body + "{% endfor %}")
    contents = ["\n a\n", "\nb\n", " c", "\n\n d\t\n"]
    messages = [{**message, "content": content} for message, content in zip(MULTI, contents)]
    encoded = ConversationEncoder(tokenizer, "native").encode(messages)
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    kept = getattr(contents[3], side)("\n")
    last = encoded.message == 3
    assert encoded.start[last][0] == contents[3].index(kept)
    assert encoded.end[last][-2] == contents[3].index(kept) + len(kept)


def test_whitespace_only_answer_that_is_trimmed_away_leaves_the_end_of_turn(llama3):
    encoded = encode_conversation(llama3, [SINGLE[0], {"role": "assistant", "content": " \n "}], "native")
    assert list(zip(encoded.start, encoded.end)) == [(3, 4)]


def test_pivot_template_takes_each_tokenizers_own_bos_and_end_of_turn(openchat, qwen, llama3, tiny_unigram):
    toks = {"openchat": openchat, "qwen": qwen, "llama3": llama3, "tiny": tiny_unigram}
    own = {
        "openchat": ("<s>", "<|end_of_turn|>"),
        "qwen": ("", "<|im_end|>"),
        "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
        "tiny": ("<s>", "<|end|>"),
    }
    for model, tokenizer in toks.items():
        for pivot, pivot_tokenizer in toks.items():
            template = resolve_template("pivot", tokenizer, pivot_tokenizer)
            encoder = ConversationEncoder(tokenizer, template)
            encoded = encoder.encode(MULTI)
            (p_bos, p_turn), (bos, turn) = own[pivot], own[model]
            text = pivot_tokenizer.apply_chat_template(MULTI, tokenize=False)
            text = bos + text.removeprefix(p_bos).replace(p_turn, turn)
            assert list(encoded.input_ids) == tokenizer(text, add_special_tokens=False).input_ids, (model, pivot)
            assert encoder.end_of_turn_id == tokenizer.convert_tokens_to_ids(turn)
            check(tokenizer, MULTI, encoded)
            if bos:
                assert encoded.input_ids[0] == tokenizer.convert_tokens_to_ids(bos)


def test_pivots_end_of_turn_in_a_content_is_left_alone_for_the_source(openchat, qwen):
    messages = [SINGLE[0], {"role": "assistant", "content": "write <|end_of_turn|> to stop"}]
    template = resolve_template("pivot", qwen, openchat)
    encoded = ConversationEncoder(qwen, template).encode(messages)
    check(qwen, messages, encoded)
    assert "write <|end_of_turn|> to stop<|im_end|>" in qwen.decode(encoded.input_ids)
    with pytest.raises(
        Unusable, match="message 1 holds the text of the special token '<|end_of_turn|>'".replace("|", r"\|")
    ):
        ConversationEncoder(openchat, template).encode(messages)


@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("text", ["<s>", "a</s>b", "<|end_of_turn|>", "<unk>"])
def test_special_token_text_in_a_content_is_refused(openchat, role, text):
    messages = [dict(m) for m in SINGLE]
    messages[role]["content"] = f"x {text} y"
    with pytest.raises(Unusable, match=f"message {role} holds the text of the special token") as caught:
        encode_conversation(openchat, messages)
    assert caught.value.reason == "special_token"


def test_turn_markers_that_a_tokenizer_does_not_call_special_are_refused_all_the_same(openchat):
    data = json.loads(stand_in("yi").backend_tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] == "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<|endoftext|>"
    )
    tokenizer.add_tokens(["<h1>", "\n\n"])  # added for good use, as Gemma's are
    for template in (resolve_template("native", tokenizer), resolve_template("pivot", tokenizer, openchat)):
        encoder = ConversationEncoder(tokenizer, template)
        for marker in ("<|im_start|>", "<|im_end|>"):
            with pytest.raises(Unusable, match=r"message 0 holds the text of the special token '<\|im_"):
                encoder.encode([{"role": "user", "content": f"x{marker}y"}, SINGLE[1]])
        encoded = encoder.encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": "<h1>\n\ny"}])
        blank = ["Ġ"] if template.name == "pivot" else []  # OpenChat's "Assistant: "
        assert [tokenizer.convert_ids_to_tokens(int(i)) for i in encoded.input_ids[encoded.predicted]] == [
            *blank,
            "<h1>",
            "\n\n",
            "y",
            "<|im_end|>",
        ]
        assert list(zip(encoded.start, encoded.end)) == [*[(0, 0)] * len(blank), (0, 4), (4, 6), (6, 7), (7, 8)]


def test_content_that_becomes_special_only_beside_the_template_is_refused(tiny_bpe):
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{{ '>\n' if m['role'] == 'user' else '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = stand_in("qwen", source)
    fine = ConversationEncoder(tokenizer, "native").encode(SINGLE)
    assert len(fine.input_ids)
    with pytest.raises(Unusable, match="message 0 joins its surroundings to a special token"):
        ConversationEncoder(tokenizer, "native").encode([{"role": "user", "content": "say <|im_end|"}, SINGLE[1]])


BODY = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        ("{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + BODY
         + "{% endfor %}", SYSTEM + SINGLE, r"refuses the conversation \(no system\)"),
        ("{% for m in messages %}{% if m['role'] != 'system' %}" + BODY + "{% endif %}{% endfor %}", SYSTEM + SINGLE,
         r"leaves out message 0 \(system\)"),
        ("{{ messages[0]['content'] }}{% for m in messages %}" + BODY + "{% endfor %}", SINGLE, "repeats message 0"),
        ("{% for m in messages %}" + BODY.replace("m['content']", "m['content'].split('</t>')[-1]") + "{% endfor %}",
         [SINGLE[0], {"role": "assistant", "content": "<t>hm</t>yes"}],
         "changes the text of or around message 1"),
        ("{% for m in messages %}" + BODY.replace("m['content']", "m['content'] | upper") + "{% endfor %}", SINGLE,
         "changes the text of or around message 0"),
        ("{% for m in messages if m['role'] != 'system' %}{% if loop.last %}{{ messages[0]['content'] }}{% endif %}"
         + BODY + "{% endfor %}", [*SYSTEM, *SINGLE, SINGLE[0]], "renders the first 3 messages differently"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", SINGLE,
         "end of turn|ends no turn"),
        ("{% for m in messages %}" + BODY + "{% endfor %}{{ messages[-1]['content'] | length }}", SINGLE,
         "changes the text|adds text at the end"),
    ],
    ids=["raises", "drops", "repeats", "thinking", "changes", "moves_system", "no_turn", "counts"],
)  # fmt: skip
def test_template_that_does_not_keep_the_conversation_is_refused_with_the_reason(source, messages, reason):
    encoder = ConversationEncoder(stand_in("qwen", source), "native")
    with pytest.raises(Unusable, match=reason) as caught:
        encoder.encode(messages)
    assert caught.value.reason == "template"


THINKS = (  # as Qwen3: an empty think block in the last answer only
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
RETURNS = (  # as gpt-oss: the last answer ends with a token of its own
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|final|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}{% endfor %}"
)
LAST_QUESTION = (  # as Mistral v3: the system text opens the last question
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% set questions = rest | selectattr('role', 'equalto', 'user') | list %}{% for m in rest %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if system is defined and m == questions[-1] %}{{ system + '\n\n' }}{% endif %}{{ m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + '</s>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("family", "source", "messages", "answers", "context"),
    [
        ("qwen", THINKS, SINGLE, {1}, 0),
        ("qwen", THINKS, MULTI, {3}, 1),
        ("mistral", LAST_QUESTION, MULTI, {1, 3}, 0),
        ("mistral", LAST_QUESTION, SYSTEM + SINGLE, {2}, 0),
        ("mistral", LAST_QUESTION, SYSTEM + MULTI, {4}, 1),
    ],
)
def test_answer_that_reads_otherwise_once_the_conversation_goes_on_is_context(
    family, source, messages, answers, context
):
    tokenizer = stand_in(family, source)
    encoded = ConversationEncoder(tokenizer, "native").encode(messages)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert list(encoded.input_ids) == tokenizer(text, add_special_tokens=False).input_ids
    assert (set(encoded.message.tolist()), encoded.context_answers) == (answers, context)
    for n in answers:
        # what the model saw when it gave this answer is what stands before it here
        alone = ConversationEncoder(tokenizer, "native").encode(messages[: n + 1])
        first = int(encoded.predicted[encoded.message == n][0])
        assert first == int(alone.predicted[alone.message == n][0])
        np.testing.assert_array_equal(encoded.input_ids[: first + 1], alone.input_ids[: first + 1])


def test_end_of_turn_that_only_the_last_answer_has_is_predicted_there_alone(openchat):
    tokenizer = stand_in("qwen", RETURNS)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<|return|>", "<|final|>")])
    encoder = ConversationEncoder(tokenizer, "native")
    assert encoder.end_of_turn == "<|return|>"
    encoded = encoder.encode(MULTI)
    text = tokenizer.apply_chat_template(MULTI, tokenize=False)
    assert list(encoded.input_ids) == tokenizer(text, add_special_tokens=False).input_ids
    assert encoded.context_answers == 0
    for n, ends in ((1, ["Hi there."]), (3, ["Fine, thank you.", "<|return|>"])):
        mine = encoded.message == n
        size = len(MULTI[n]["content"])
        assert tokenizer.decode(encoded.input_ids[encoded.predicted[mine]]) == "".join(ends)
        assert (encoded.start[mine][0], encoded.end[mine][-1]) == (0, size + (n == 3))
    # a source of another family: its own end of turn, at the last answer alone too
    source = ConversationEncoder(openchat, resolve_template("pivot", openchat, tokenizer)).encode(MULTI)
    assert [(n, end) for n, end in zip(source.message, source.end) if end == len(MULTI[n]["content"]) + 1] == [(3, 17)]
    assert source.input_ids[-1] == openchat.eos_token_id


def test_token_that_runs_out_of_an_answer_without_an_end_of_turn_is_not_predicted(llama3):
    source = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ('<|eot_id|>' if loop.last else '\n\n') }}"
        "{% endfor %}"
    )
    llama3 = PreTrainedTokenizerFast(
        tokenizer_object=llama3.backend_tokenizer, eos_token="<|eot_id|>", chat_template=source
    )
    encoded = encode_conversation(llama3, MULTI)  # 'Hi there.' + '\n\n': llama-3 has '.\n\n' as one token
    pieces = [llama3.decode([int(i)]) for i in encoded.input_ids[encoded.predicted]]
    assert pieces == [" Hi", " there", " Fine", ",", " thank", " you", ".", "<|eot_id|>"]
    assert list(zip(encoded.message, encoded.start, encoded.end))[:3] == [(1, 0, 2), (1, 2, 8), (3, 0, 4)]


def test_answer_of_weight_0_is_context(openchat):
    messages = [MULTI[0], {**MULTI[1], "weight": 0}, *MULTI[2:]]
    whole, weighed = encode_conversation(openchat, MULTI), encode_conversation(openchat, messages)
    np.testing.assert_array_equal(weighed.input_ids, whole.input_ids)
    np.testing.assert_array_equal(weighed.predicted, whole.predicted[whole.message == 3])
    assert weighed.context_answers == 0


def smollm():
    """ChatML with a system text of its own, whose tokenizer names `<|im_start|>` as BOS, as SmolLM2's does."""
    source = (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}" + BODY + "{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_bpe().backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=source,
    )


def test_bos_that_opens_every_turn_is_no_bos(openchat, llama3, qwen):
    tokenizer = smollm()
    template = native_template(tokenizer)
    assert (template.bos, bos_of(tokenizer), template.end_of_turn) == ("", "", "<|im_end|>")
    assert bos_of(openchat) == "<s>"
    assert bos_of(llama3) == "<|begin_of_text|>"
    native = ConversationEncoder(tokenizer, "native").encode(SINGLE)
    text = tokenizer.apply_chat_template(SINGLE, tokenize=False)
    assert list(native.input_ids) == tokenizer(text, add_special_tokens=False).input_ids
    # as a source it gets no second one before a template that has none, nor before one that has a BOS
    chatml = ConversationEncoder(tokenizer, resolve_template("pivot", tokenizer, qwen)).encode(SINGLE)
    assert tokenizer.decode(chatml.input_ids) == qwen.apply_chat_template(SINGLE, tokenize=False)
    other = ConversationEncoder(tokenizer, resolve_template("pivot", tokenizer, openchat)).encode(SINGLE)
    assert tokenizer.decode(other.input_ids).startswith("GPT4 Correct User: Hello<|im_end|>")
    # as the pivot its first turn keeps its opening in other models' prompts, after their own BOS where they have one
    for source, bos in ((qwen, ""), (llama3, "<|begin_of_text|>")):
        encoded = ConversationEncoder(source, resolve_template("pivot", source, tokenizer)).encode(SINGLE)
        assert source.decode(encoded.input_ids) == bos + text.replace("<|im_end|>", source.eos_token)


def test_source_whose_special_tokens_have_the_pivots_names_keeps_its_own_bos_and_end_of_turn(openchat):
    plain = "{% for m in messages %}{{ m['role'] + '> ' + m['content'] + eos_token }}{% endfor %}"
    names = {"bos_token": "<s>", "eos_token": "<|end_of_turn|>"}
    backend = Tokenizer.from_str(openchat.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    pivot = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=plain, **names)
    stops = plain.replace("eos_token", "'</s>'")
    source = PreTrainedTokenizerFast(tokenizer_object=openchat.backend_tokenizer, chat_template=stops, **names)
    assert pivot.special_tokens_map == source.special_tokens_map
    as_pivot = ConversationEncoder(pivot, resolve_template("pivot", pivot, pivot))
    assert (as_pivot.bos, as_pivot.end_of_turn) == ("", "<|end_of_turn|>")
    encoder = ConversationEncoder(source, resolve_template("pivot", source, pivot))
    assert (encoder.bos, encoder.end_of_turn) == ("<s>", "</s>")
    encoded = encoder.encode(SINGLE)
    check(source, SINGLE, encoded)
    assert [encoded.input_ids[0], encoded.input_ids[-1]] == source.convert_tokens_to_ids(["<s>", "</s>"])


def test_bos_before_each_question_becomes_the_models_own(openchat, qwen, llama3):
    source = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    pivot = PreTrainedTokenizerFast(
        tokenizer_object=openchat.backend_tokenizer, bos_token="<s>", eos_token="</s>", chat_template=source
    )
    assert native_template(pivot).bos == "<s>"
    for model, bos in ((qwen, ""), (llama3, "<|begin_of_text|>")):
        encoded = ConversationEncoder(model, resolve_template("pivot", model, pivot)).encode(MULTI)
        text = pivot.apply_chat_template(MULTI, tokenize=False)
        assert model.decode(encoded.input_ids) == text.replace("<s>", bos).replace("</s>", model.eos_token)


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
         "{{ date_string }}", "26 Jul 2024\n"),
        ("Current date: {{ strftime_now('%Y-%m-%d') }}", "Current date: 2024-07-26\n"),
    ],
    ids=["llama-3.1", "gpt-oss"],
)  # fmt: skip
def test_template_must_not_depend_on_the_day(head, text):
    tokenizer = stand_in("qwen", head + "\n{% for m in messages %}" + BODY + "{% endfor %}")
    encoded = ConversationEncoder(tokenizer, "native").encode(SINGLE)
    assert tokenizer.decode(encoded.input_ids).startswith(text)


def test_jinja_file_built_in_name_and_neither(tmp_path, openchat):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + '> ' + m['content'] + eos_token }}{% endfor %}"
    )
    encoded = encode_conversation(openchat, SINGLE, str(file))
    assert openchat.decode(encoded.input_ids).replace("<s> ", "<s>").startswith("<s>user> Hello<|end_of_turn|>")
    check(openchat, SINGLE, encoded)
    with pytest.raises(InputError, match=r"expected one of pivot, native, openchat_3.5, .* got neither"):
        resolve_template("chatmlx", openchat)
    file.write_text("{% for m in %}")
    with pytest.raises(InputError, match=r"mine.jinja: expected a Jinja chat template"):
        resolve_template(str(file), openchat)


def test_tokenizer_without_template_or_known_marks_asks_for_one(tiny_unigram):
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_unigram.backend_tokenizer, eos_token="</s>", bos_token="<s>")
    with pytest.raises(InputError, match=r"Set template to one of openchat_3.5, mistral, .* or a .jinja file"):
        native_template(bare)
    # but another's template serves it, with its own EOS and BOS
    encoded = encode_conversation(bare, SINGLE, "openchat_3.5")
    assert encoded.input_ids[encoded.predicted[-1]] == bare.eos_token_id


def test_of_several_named_templates_the_default_is_taken():
    tokenizer = stand_in("qwen")
    source = "{% for m in messages %}" + BODY + "{% endfor %}"
    tokenizer.chat_template = {"default": source, "tools": "no"}
    assert native_template(tokenizer).source == source
    tokenizer.chat_template = {"rag": source, "tools": "no"}
    with pytest.raises(InputError, match=r"expected one named default, got rag, tools. Set template to a .jinja file"):
        native_template(tokenizer)


def test_truncation_keeps_whole_tokens_and_says_so(openchat):
    whole = encode_conversation(openchat, MULTI)
    assert not whole.truncated
    for length in (len(whole.input_ids) - 1, 21, 19):
        cut = encode_conversation(openchat, MULTI, max_length=length)
        assert cut.truncated
        np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:length])
        kept = whole.predicted < length
        for name in ("predicted", "message", "start", "end"):
            np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name)[kept])
    with pytest.raises(Unusable, match="no predicted token within 17 tokens") as caught:
        encode_conversation(openchat, MULTI, max_length=17)
    assert caught.value.reason == "too_long"


def test_text_that_the_tokens_do_not_give_back_is_refused_with_the_reason(qwen, openchat):
    messages = [SINGLE[0], {"role": "assistant", "content": "e\u0301"}]
    with pytest.raises(Unusable, match="not in Unicode's NFC form") as caught:
        encode_conversation(qwen, messages)
    assert caught.value.reason == "bytes"
    check(openchat, messages, encode_conversation(openchat, messages))


def test_special_tokens_that_swallow_blanks_leave_a_hole(openchat):
    data = json.loads(stand_in("phi-3").backend_tokenizer.to_str())
    for token in data["added_tokens"]:
        token["rstrip"] = token["content"] != "<s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<|end|>", bos_token="<s>"
    )
    encoded = encode_conversation(tokenizer, [SINGLE[0], {"role": "assistant", "content": "  indented"}], "native")
    assert encoded.start[0] == 2
    assert encoded.end[-2] == 10


def test_vocabulary_may_have_holes_and_no_added_tokens():
    read = json.loads(tiny_bpe().backend_tokenizer.to_str())
    moved = read["model"]["vocab"].pop("a")
    read["model"]["vocab"]["a"] = 5000
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(read)))
    tokenizer.chat_template = tiny_bpe().chat_template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a b"}]
    plain, holed = (ConversationEncoder(t, "qwen").encode(messages) for t in (tiny_bpe(), tokenizer))
    assert 5000 in holed.input_ids
    assert np.where(holed.input_ids == 5000, moved, holed.input_ids).tolist() == plain.input_ids.tolist()
    assert holed.predicted.tolist() == plain.predicted.tolist()


def test_answer_without_text_where_a_token_without_bytes_stands(monkeypatch):
    """An inserted mark right at an empty content belongs to what follows: only the end of turn is predicted there."""
    encoder = ConversationEncoder(tiny_bpe(), "qwen")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ""}]
    plain = encoder.encode(messages)
    at = int(plain.predicted[0])
    ids, spans = encoder._ids, token_spans
    monkeypatch.setattr(encoder, "_ids", lambda text: [*ids(text)[:at], 300, *ids(text)[at:]])

    def with_empty(tokenizer, text, found):
        start, end = spans(tokenizer, text, np.delete(found, at))
        return np.insert(start, at, start[at]), np.insert(end, at, start[at])

    monkeypatch.setattr("fusechat_fuse.text.chat.token_spans", with_empty)
    got = encoder.encode(messages)
    assert (got.predicted.tolist(), got.start.tolist(), got.end.tolist()) == ([at + 1], [0], [1])


@pytest.mark.parametrize(
    "body", ["{{ 1 // 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"], ids=["division", "recursion"]
)
def test_template_that_fails_in_whatever_way_refuses_the_conversation(body, tmp_path, qwen):
    (tmp_path / "bad.jinja").write_text(
        "{% for m in messages %}" + BODY + "{% endfor %}{% if messages | length > 2 %}" + body + "{% endif %}"
    )
    with pytest.raises(Unusable, match="the chat template refuses the conversation") as caught:
        ConversationEncoder(qwen, str(tmp_path / "bad.jinja")).encode(MULTI)
    assert caught.value.reason == "template"


def test_contents_with_texts_of_special_tokens_have_a_share_limit():
    entries = [{"reason": "special_token", "detail": "message 0 holds the text of the special token '</s>'"}] * 3
    check_template(entries, 30)
    check_template(entries[:1], 2)  # one alone is no pattern
    with pytest.raises(
        InputError, match=r"special tokens for the data: expected to leave out at most 10%, got 3 of 29"
    ):
        check_template(entries, 29)


@pytest.mark.parametrize("special", [True, False])
def test_reasoning_in_a_family_that_owns_its_marks(special):
    source = "{% for m in messages %}" + BODY + "{% endfor %}{# <think> </think> #}"
    tokenizer = stand_in("qwen", source)
    marks = [AddedToken(mark, special=special, normalized=False) for mark in ("<think>", "</think>")]
    tokenizer.add_tokens(marks, special_tokens=special)
    messages = [SINGLE[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi"}]
    encoder = ConversationEncoder(tokenizer, "native")
    if special:  # no bytes, and cut from what the model says
        with pytest.raises(Unusable, match="message 1 holds the text of the special token '<think>'"):
            encoder.encode(messages)
        return
    encoded = encoder.encode(messages)
    check(tokenizer, messages, encoded)
    pieces = tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.predicted].tolist())
    assert [pieces[0], *[piece for piece in pieces[1:] if "think" in piece]] == ["<think>", "</think>"]


TAKES_APART = (  # as Qwen3: reasoning is cut out of the content, and put before it again in the last answer only
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set parts = m['content'].split('</think>') %}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n' }}"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}{{ '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_template_that_takes_reasoning_apart():
    tokenizer = stand_in("qwen", TAKES_APART)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    encoder = ConversationEncoder(tokenizer, "native")
    reasoned = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi"}
    for messages in ([SINGLE[0], reasoned], [*MULTI[:3], reasoned]):
        encoded = encoder.encode(messages)
        assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(encoded.input_ids[encoded.predicted]) == reasoned["content"] + "<|im_end|>"
        check(tokenizer, messages[-2:], replace(encoded, message=encoded.message - len(messages) + 2))
    with pytest.raises(Unusable, match="changes the text of or around message 1"):  # it drops earlier reasoning
        encoder.encode([SINGLE[0], reasoned, *MULTI[2:]])
    # an answer without reasoning: the empty block is the template's, not the model's
    encoded = encoder.encode(SINGLE)
    assert tokenizer.decode(encoded.input_ids[encoded.predicted]) == "Hi there.<|im_end|>"


@pytest.mark.parametrize("source", [None, THINKS, LAST_QUESTION], ids=["plain", "thinks", "last question"])
def test_answers_probed_in_a_few_places_are_as_if_each_was_probed(source, monkeypatch):
    tokenizer = stand_in("mistral" if source == LAST_QUESTION else "qwen", source)
    template = native_template(tokenizer)
    for count in (*range(1, 12), 40):
        for system in ((), ("system",)):
            roles = (*system, *("user", "assistant") * count)
            few = layout.probe_layout(template, [{"role": role} for role in roles])
            with monkeypatch.context() as patch:
                patch.setattr(layout, "_probe_alike", lambda pieces, probe: {n: probe(n) for n in pieces})
                assert layout.probe_layout(template, [{"role": role} for role in roles]) == few


def test_cost_of_a_template_grows_with_the_messages(openchat, monkeypatch):
    def messages_rendered(count: int) -> int:
        rendered = []
        template = native_template(openchat)
        whole = type(template).render
        monkeypatch.setattr(
            type(template), "render", lambda self, m, *more: rendered.append(len(m)) or whole(self, m, *more)
        )
        layout.probe_layout(template, [{"role": role} for role in ("user", "assistant") * count])
        monkeypatch.undo()
        return sum(rendered)

    assert messages_rendered(800) < 12 * messages_rendered(100)  # 64 times as many when each is probed


def test_a_text_is_tokenized_no_further_than_to_an_end_of_turn_after_max_length(openchat):
    messages = [
        m
        for n in range(400)
        for m in ({"role": "user", "content": f"q{n} 你"}, {"role": "assistant", "content": "1 " * (n % 9)})
    ]
    messages[1] = {"role": "assistant", "content": " " * 1000}  # few tokens: the first place to cut is not far enough
    whole = ConversationEncoder(openchat, "native", max_length=10**6).encode(messages)
    encoder = ConversationEncoder(openchat, "native", max_length=100)
    seen, ids = [], encoder._ids
    encoder._ids = lambda text: seen.append(len(text)) or ids(text)
    cut = encoder.encode(messages)
    assert len(seen) == 2
    assert max(seen) < 4000
    assert cut.truncated
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:100])
    kept = whole.predicted < 100
    for name in ("predicted", "message", "start", "end"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name)[kept])


def test_template_without_any_special_token_is_refused(tmp_path):
    alphabet = {character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    encoder = ConversationEncoder(tokenizer, resolve_template(str(tmp_path / "plain.jinja"), tokenizer))
    with pytest.raises(Unusable, match="the chat template ends no turn with a token of the vocabulary"):
        encoder.encode(SINGLE)
