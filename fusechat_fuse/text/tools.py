"""Tool calls of chat data, in OpenAI's format, and whether a chat template renders them.

`tool_calls` of an assistant message are answered by `tool` messages; a row may list the `tools` that it offers.

A conversation that calls tools carries them in its messages: `tools` in the first, `tool_calls` in those that call,
`tool_call_id` and `name` in the results. They are context: a template renders them in ways of its own, so no byte of
them has a place that two models share.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fusechat_fuse.errors import Unusable

Message = dict[str, Any]
FIELDS = ("tools", "tool_calls", "tool_call_id", "name")  # of a message, besides role, content and weight


def calls_tools(message: Message) -> bool:
    """Whether a message calls tools."""
    return "tool_calls" in message


def uses_tools(messages: list[Message]) -> bool:
    """Whether a conversation calls tools or holds their results."""
    return any(message["role"] == "tool" or calls_tools(message) for message in messages)


def is_surrounding(message: Message) -> bool:
    """Whether a message is rendered as part of the text around the others: a tool's result, or a call without text."""
    return message["role"] == "tool" or (calls_tools(message) and not message["content"])


def as_texts(message: Message) -> Message:
    """A message whose tools and calls are JSON texts."""
    more = {name: message[name] for name in ("tools", "tool_calls") if name in message}
    return {**message, **{name: json.dumps(value, ensure_ascii=False) for name, value in more.items()}}


def fields_of(position: int, message: Message, role: str) -> Message:
    """The fields of one raw message that concern tools. Raises: Unusable where a call has no name."""
    if role == "tool":
        return {name: str(message[name]) for name in ("tool_call_id", "name") if message.get(name)}
    calls = _parsed(message.get("tool_calls")) or [_parsed(message.get("function_call"))]
    if role != "assistant" or calls == [None]:
        return {}
    return {"tool_calls": [_call(f"message {position}", call) for call in _list(f"message {position}", calls)]}


def tools_of(row: dict, raw: list) -> list[dict[str, Any]]:
    """The tools that a row offers: its column `tools` or `functions`, or the field `tools` of its first message."""
    first = raw[0].get("tools") if isinstance(raw[0], dict) else None
    value = _parsed(row.get("tools")) or _parsed(row.get("functions")) or _parsed(first) or []
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in _list("tools", value)]
    for tool in tools:
        _name_of("tools", tool["function"])
    return tools


def check_rendered(messages: list[Message], render: Callable[[list[Message]], str]) -> None:
    """Raise Unusable where a template leaves out a call, a result or a tool: names and contents unlike any others, in
    their places, must all be rendered.

    Args:
        render: the template's.
    """
    expected: dict[str, str] = {}

    def mark(what: str) -> str:
        expected[found := f"QZt{len(expected)}tZQ"] = what
        return found

    def renamed(function: Any, what: str) -> dict[str, Any]:
        return {**function, "name": mark(what)} | ({"arguments": {"x": mark(what)}} if "arguments" in function else {})

    marked = []
    for n, message in enumerate(messages):
        new = dict(message)
        if message["role"] == "tool":
            new["content"] = mark(f"the tool's result, message {n}")
        for field, what in (("tool_calls", f"a tool call of message {n}"), ("tools", "the list of tools")):
            if field in message:
                new[field] = [{**each, "function": renamed(each["function"], what)} for each in message[field]]
        marked.append(new)
    text = render(marked)
    for text_of_mark, what in expected.items():
        if text_of_mark not in text:
            raise Unusable("template", f"the chat template leaves out {what}")


def _parsed(value: Any) -> Any:
    """The value of a JSON text, else the value itself; None for nothing."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value or None
    return value or None


def _list(where: str, value: Any) -> list[dict[str, Any]]:
    entries = [_parsed(entry) for entry in value] if isinstance(value, list) else [value]
    if not all(isinstance(entry, dict) and isinstance(entry.get("function", entry), dict) for entry in entries):
        raise Unusable("tool_calls", f"{where}: expected a list of functions, got {value!r:.80}")
    return entries


def _name_of(where: str, function: dict[str, Any]) -> str:
    if not isinstance(name := function.get("name"), str) or not name:
        raise Unusable("tool_calls", f"{where}: expected the name of a function, got {function!r:.80}")
    return name


def _call(where: str, call: dict[str, Any]) -> dict[str, Any]:
    """A call as templates take it: the arguments as an object, where their text is one."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    parsed = _parsed(arguments) or {}
    own = {"name": _name_of(where, function), "arguments": parsed if isinstance(parsed, dict) else arguments}
    return {"type": "function", "function": own} | ({"id": str(call["id"])} if call.get("id") else {})
