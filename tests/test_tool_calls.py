"""Conversations that call tools: read in OpenAI's format, rendered by published templates, the text answers predicted.

Expected texts are written out with « and » around what is predicted, so that masks are asserted byte for byte.
"""

import json
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import AddedToken

import fusechat_fuse
from fusechat_fuse.evaluation.questions import answered_data, read_questions
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.conversations import load_conversations, read_conversations
from fusechat_fuse.text.messages import Unusable, clean_messages, content_hash
from fusechat_fuse.text.spans import token_spans
from fusechat_fuse.text.templates import resolve_template
from tests.helpers import real_tokenizers, tiny_runs

USER, ANSWER = {"role": "user", "content": "Weather in Paris?"}, {"role": "assistant", "content": "It is 22."}
FUNCTION = {"name": "weather", "arguments": {"city": "Paris"}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": FUNCTION, "id": "abcdef123"}],
}
RESULT = {"role": "tool", "content": "22 °C", "tool_call_id": "abcdef123", "name": "weather"}
ONE = [USER, CALL, RESULT, ANSWER]
TWO = [*ONE, {"role": "user", "content": "And Rome?"}, {"role": "assistant", "content": "Ask again 好."}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
OPENAI = {**CALL, "content": None, "tool_calls": [{**CALL["tool_calls"][0], "function": {**FUNCTION}}]}
OPENAI["tool_calls"][0]["function"]["arguments"] = '{"city": "Paris"}'  # as OpenAI's own answers have them


def with_tools(messages, tools=(TOOL,)):
    return [{**messages[0], "tools": list(tools)}, *messages[1:]]


def published(name):
    """A chat template as its authors published it, from TRL's collection."""
    spec = find_spec("trl")
    file = Path(spec.submodule_search_locations[0], "chat_templates", f"{name}.jinja") if spec else Path("none")
    if not file.is_file():
        pytest.skip("trl's collection of templates is not installed")
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def families():
    pytest.importorskip("mistral_common.integrations.chat_templates.chat_templates")
    qwen, llama, mistral = real_tokenizers.qwen(), real_tokenizers.llama3(), real_tokenizers.mistral()
    names = [f"<{slash}{name}>" for name in ("tool_call", "tool_response", "think") for slash in ("", "/")]
    qwen.add_tokens([AddedToken(name, normalized=False) for name in names])
    qwen.chat_template, llama.chat_template = published("qwen3"), published("llama3_1")
    return {"qwen": qwen, "llama": llama, "mistral": mistral, "openchat": real_tokenizers.openchat()}


QWEN_TOOLS = (
    "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}\n'
    "</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
QWEN_CALL = (
    "<|im_start|>user\nWeather in Paris?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\n22 °C\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
QWEN_ONE = QWEN_CALL + "<think>\n\n</think>\n\n«It is 22.<|im_end|>»\n"
QWEN_TWO = (
    QWEN_CALL + "It is 22.<|im_end|>\n<|im_start|>user\nAnd Rome?<|im_end|>\n<|im_start|>assistant\n<think>\n\n"
    "</think>\n\n«Ask again 好.<|im_end|>»\n"
)
LLAMA_SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
LLAMA_ONE = ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n" + LLAMA_SYSTEM) + (
    "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
    "function call with its proper arguments that best answers the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
    '{\n    "type": "function",\n    "function": {\n        "name": "weather",\n        "parameters": {\n'
    '            "type": "object",\n            "properties": {}\n        }\n    }\n}\n\nWeather in Paris?<|eot_id|>'
    '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"22 °C"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n«It is 22.<|eot_id|>»"
)
LLAMA_TWO = LLAMA_ONE + (
    "<|start_header_id|>user<|end_header_id|>\n\nAnd Rome?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Ask again 好.<|eot_id|>»"
)
MISTRAL_TOOLS = (
    '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", '
    '"properties": {}}}}][/AVAILABLE_TOOLS]'
)
MISTRAL_CALL = (
    '[INST] Weather in Paris?[/INST][TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": '
    '"abcdef123"}]</s>[TOOL_RESULTS] {"content": "22 °C", "call_id": "abcdef123"}[/TOOL_RESULTS]'
)
MISTRAL_ROME = "[INST] And Rome?[/INST]« Ask again 好.</s>»"
NATIVE = {
    "qwen-tools-one": ("qwen", "qwen", with_tools(ONE), QWEN_TOOLS + QWEN_ONE, 0),
    "qwen-tools-two": ("qwen", "qwen", with_tools(TWO), QWEN_TOOLS + QWEN_TWO, 1),
    "qwen-one": ("qwen", "qwen", ONE, QWEN_ONE, 0),
    "llama-tools-two": ("llama", "llama", with_tools(TWO), LLAMA_TWO, 0),
    "mistral-tools-one": (
        "mistral",
        "mistral",
        with_tools(ONE),
        f"<s>{MISTRAL_TOOLS}{MISTRAL_CALL}« It is 22.</s>»",
        0,
    ),
    "mistral-tools-two": (  # which stand before the last question
        "mistral",
        "mistral",
        with_tools(TWO),
        f"<s>{MISTRAL_CALL} It is 22.</s>{MISTRAL_TOOLS}{MISTRAL_ROME}",
        1,
    ),
    "mistral-two": ("mistral", "mistral", TWO, f"<s>{MISTRAL_CALL}« It is 22.</s>»{MISTRAL_ROME}", 0),
    "openchat-as-qwen": (
        "openchat",
        "qwen",
        with_tools(TWO),
        "<s>" + (QWEN_TOOLS + QWEN_TWO).replace("<|im_end|>", "<|end_of_turn|>"),
        1,
    ),
    "llama-as-mistral": (
        "llama",
        "mistral",
        TWO,
        f"<|begin_of_text|>{MISTRAL_CALL}« It is 22.</s>»{MISTRAL_ROME}".replace("</s>", "<|eot_id|>"),
        0,
    ),
    "qwen-as-llama": (
        "qwen",
        "llama",
        with_tools(ONE),
        LLAMA_ONE.removeprefix("<|begin_of_text|>").replace("<|eot_id|>", "<|im_end|>"),
        0,
    ),
}


@pytest.mark.parametrize("case", list(NATIVE))
def test_text_answers_are_predicted_and_what_concerns_tools_is_context(families, case):
    name, pivot, messages, marked, context = NATIVE[case]
    tokenizer, text = families[name], marked.replace("«", "").replace("»", "")
    encoder = ConversationEncoder(tokenizer, resolve_template("pivot", tokenizer, families[pivot]))
    one = encoder.encode(messages)
    assert one.input_ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    mask, inside = [], False
    for character in marked:
        if character in "«»":
            inside = character == "«"
        else:
            mask += [inside] * len(character.encode())
    start, end = token_spans(tokenizer, text, one.input_ids)
    by_token = [any(mask[a:b]) for a, b in zip(start, end)]
    assert [n for n, inside in enumerate(by_token) if inside] == one.predicted.tolist()
    for n, message in enumerate(messages):
        mine = one.message == n
        if mine.any():  # spans tile the answer, the end of turn after it
            size = len(message["content"].encode())
            assert one.start[mine][0] == 0
            assert one.start[mine][1:].tolist() == one.end[mine][:-1].tolist()
            assert one.end[mine][-1] == size + 1
    assert (one.context_answers, one.tool_call_turns) == (context, 1)
    if name == pivot:
        own = [{k: v for k, v in message.items() if k != "tools"} for message in messages]
        tools = messages[0].get("tools")
        assert tokenizer.apply_chat_template(own, tools=tools, tokenize=False) == text


@pytest.mark.parametrize("own", [ONE, TWO], ids=["one", "two"])
def test_ids_are_those_of_mistrals_own_library(families, own):
    function = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    messages = with_tools(own, tools)
    own = [OPENAI if message == CALL else message for message in own]
    request = ChatCompletionRequest.from_openai(messages=own, tools=tools)
    file = files("mistral_common") / "data" / real_tokenizers.MISTRAL_FILE
    expected = MistralTokenizer.from_file(str(file), mode=ValidationMode.finetuning).encode_chat_completion(request)
    assert ConversationEncoder(families["mistral"]).encode(messages).input_ids.tolist() == expected.tokens


LONG_ID = [{**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": "call_0123456789"}]}]
SAID = {**CALL, "content": "Let me look."}
INJECTED = {**FUNCTION, "arguments": {"city": "<|im_end|>"}}


@pytest.mark.parametrize(
    ("family", "messages", "reason", "detail"),
    [
        ("openchat", ONE, "tool_calls", "the chat template leaves out a tool call of message 1"),
        ("openchat", with_tools(ONE), "tool_calls", "the chat template leaves out the list of tools"),
        ("llama", [USER, {**CALL, "tool_calls": CALL["tool_calls"] * 2}, RESULT, ANSWER], "tool_calls", "single tool"),
        ("llama", [USER, SAID, RESULT, ANSWER], "tool_calls", r"leaves out message 1 \(assistant\) of 4"),
        ("mistral", [USER, *LONG_ID, RESULT, ANSWER], "tool_calls", "must have an id of 9 characters"),
        ("mistral", [USER, SAID, RESULT, ANSWER], "tool_calls", "cannot have both content and tool calls"),
        (
            "qwen",
            [USER, {**CALL, "tool_calls": [{"function": INJECTED}]}, RESULT, ANSWER],
            "special_token",
            "message 1 holds the text of the special token '<|im_end|>'",
        ),
        ("qwen", [USER, CALL, {**RESULT, "content": "<tool_call>"}, ANSWER], "special_token", "message 2 holds"),
    ],
)
def test_templates_that_refuse_or_drop_tools(families, family, messages, reason, detail):
    with pytest.raises(Unusable, match=detail.replace("|", r"\|")) as caught:
        ConversationEncoder(families[family]).encode(messages)
    assert caught.value.reason == reason


def test_text_before_a_call_is_context(families):
    one = ConversationEncoder(families["qwen"]).encode([USER, SAID, RESULT, ANSWER])
    assert "assistant\nLet me look.\n<tool_call>" in families["qwen"].decode(one.input_ids)
    assert (set(one.message.tolist()), one.context_answers, one.tool_call_turns) == ({3}, 0, 1)


READ = {
    "openai": ([USER, OPENAI, RESULT, ANSWER], {"tools": [TOOL]}),
    "texts": (
        [USER, {**CALL, "content": None, "tool_calls": json.dumps(CALL["tool_calls"])}, RESULT, ANSWER],
        {"tools": json.dumps([TOOL])},
    ),
    "bare": ([USER, {**CALL, "tool_calls": [{"id": "abcdef123", **FUNCTION}]}, RESULT, ANSWER], {"functions": [TOOL]}),
    "bare_tools": ([USER, OPENAI, RESULT, ANSWER], {"tools": [TOOL["function"]]}),
    "tools_as_texts": ([USER, OPENAI, RESULT, ANSWER], {"tools": [json.dumps(TOOL)]}),
    "leading": ([ANSWER, USER, OPENAI, RESULT, ANSWER], {"tools": [TOOL]}),
}


@pytest.mark.parametrize("shape", list(READ))
def test_calls_are_read_in_every_shape(shape):
    messages, columns = READ[shape]
    found, report = read_conversations([{"messages": messages, **columns}])
    assert found[0].messages == with_tools(ONE)
    assert not [entry for entry in report.repaired if entry["reason"] != "leading_assistant"]


def test_the_older_function_call_is_a_tool_call():
    older = {"role": "assistant", "content": None, "function_call": OPENAI["tool_calls"][0]["function"]}
    result = {"role": "function", "name": "weather", "content": "22 °C"}
    messages, _ = clean_messages({"messages": [USER, older, result, ANSWER]})
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}]}
    assert messages == [USER, call, {"role": "tool", "content": "22 °C", "name": "weather"}, ANSWER]


def test_calls_are_read_again_as_they_were(tmp_path):
    data = load_conversations([{"id": "a", "messages": ONE, "tools": [TOOL]}, {"id": "b", "messages": [USER, ANSWER]}])
    assert json.loads(data[0]["messages"][0]["tools"]) == [TOOL]
    data.to_json(tmp_path / "d.jsonl")
    for rows in (data, tmp_path / "d.jsonl"):
        found, _ = read_conversations(rows, strict=True)
        assert [one.messages for one in found] == [with_tools(ONE), [USER, ANSWER]]
        assert found[0].content_hash == content_hash(with_tools(ONE)) != content_hash(ONE)


@pytest.mark.parametrize(
    ("messages", "columns", "reason", "detail"),
    [
        ([USER, CALL], {}, "no_answer", "expected an assistant message to be predicted, got tool calls alone"),
        ([USER, RESULT, ANSWER], {}, "tool_calls", "message 1: expected a tool's result after a tool call, got it"),
        ([USER, CALL, ANSWER], {}, "repeated_role", "two assistant messages in a row"),
        (
            [USER, {**CALL, "tool_calls": [{"function": {"arguments": {}}}]}, RESULT, ANSWER],
            {},
            "tool_calls",
            "message 1: expected the name of a function, got {'arguments': {}}",
        ),
        (
            [USER, {**CALL, "tool_calls": ["f(x)"]}, RESULT, ANSWER],
            {},
            "tool_calls",
            r"message 1: expected a list of functions, got \['f\(x\)'\]",
        ),
        (ONE, {"tools": "weather, time"}, "tool_calls", "tools: expected a list of functions, got 'weather, time'"),
        (ONE, {"tools": [{"type": "function"}]}, "tool_calls", "tools: expected the name of a function"),
        ([USER, {**RESULT, "content": {"c": 22}}, ANSWER], {}, "not_text", "expected the content as a string"),
        ([USER, CALL, {**RESULT, "name": "a\ud800"}, ANSWER], {}, "lone_surrogate", "message 2"),
    ],
)
def test_calls_that_cannot_be_used_are_skipped_with_a_sentence(messages, columns, reason, detail):
    with pytest.raises(Unusable, match=detail) as caught:
        clean_messages({"messages": messages, **columns})
    assert caught.value.reason == reason


def test_a_conversation_that_calls_tools_keeps_the_datas_answers(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"id": "a", "messages": ONE, "tools": [TOOL]}]))
    asked = list(read_questions("data", tmp_path / "d.json", None))
    assert asked[0].turns == []
    rows, kept = answered_data(asked, {"a": {"turns": [], "finished": [], "problems": []}}, "model", None)
    assert kept == {"tool_calls": 1}
    assert rows[0]["answered_by"] == "data"
    assert read_conversations(rows)[0][0].messages == with_tools(ONE)


def test_a_prompt_after_calls_is_answered_with_them(families):
    (asked,) = read_questions("chat", [{"id": "a", "messages": TWO[:5], "tools": [TOOL]}], None)
    assert asked.history == with_tools(ONE)
    prompt = resolve_template("native", families["qwen"]).render([*asked.history, TWO[4]], generation_prompt=True)
    assert prompt.startswith(QWEN_TOOLS + QWEN_CALL + "It is 22.")


KNOWS_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' "
    "+ m['content'] }}{% for call in m['tool_calls'] or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_turns_that_call_tools_are_counted_in_the_manifest(tmp_path):
    model = tiny_runs.pivot_directory(tmp_path / "model")
    (tmp_path / "t.jinja").write_text(KNOWS_TOOLS, encoding="utf-8")
    rows = [{"id": "a", "messages": TWO, "tools": [TOOL]}, {"id": "b", "messages": [USER, ANSWER]}]
    found = fusechat_fuse.represent(model, rows, tmp_path / "r", template=str(tmp_path / "t.jinja"))
    assert [row["id"] for row in found] == ["a", "b"]
    assert set(found[0]["message"].tolist()) == {3, 5}
    assert found.manifest["counts"]["tool_call_turns"] == 1
    native = fusechat_fuse.represent(model, rows, tmp_path / "native", template="native")  # ChatML, without tools
    assert native.manifest["counts"]["skipped"] == {"tool_calls": 1}
