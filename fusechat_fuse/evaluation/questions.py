"""Questions and answers in the files of each benchmark.

mt_bench     questions (JSONL): question_id, category, turns, reference?
             answers (JSONL): question_id, answer_id, model_id, choices [{index, turns}], tstamp; model_id is the
             file's name without .jsonl. The temperature depends on the category.
alpaca_eval  questions (JSON list): instruction, dataset?
             answers (JSON list): instruction, output, generator, dataset
arena_hard   questions (JSONL, version 2): uid, category?, subcategory?, prompt
             answers (JSONL): uid, ans_id, model, messages, tstamp, metadata; model is the file's name without .jsonl,
             the last message's content {thought?, answer}, metadata the counts that its style control takes
chat         questions: chat data as `represent` reads them, or prompts alone; each last user message is answered
             answers (JSONL): id, messages
held_out     questions: chat data; the last answered turn of each conversation, after the data's own turns before it
             answers (JSONL): id, slice, messages (the model's answer last), data_answer, and the data's other columns
data         questions: chat data; every turn is answered, each after the answers to the turns before it
             answers (JSONL): id, slice, messages, answered_by, data_answers, and kept_because of the data's own
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.files import short_digest
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.conversations import read_conversations, rows_of
from fusechat_fuse.text.data_files import data_sources, names_in
from fusechat_fuse.text.messages import Unusable, check_unicode
from fusechat_fuse.text.tools import uses_tools

logger = logging.getLogger(__name__)
TEMPERATURES = dict.fromkeys(("writing", "roleplay"), 0.7) | dict.fromkeys(("stem", "humanities"), 0.1)
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
TEMPERATURE_OF_OTHERS = 0.7
MAX_NEW_TOKENS = {"mt_bench": 1024, "alpaca_eval": 2048, "arena_hard": 4096}  # the judges' own limits
MAX_NEW_TOKENS |= {"chat": 1024, "held_out": 1024, "data": 1024}


@dataclass(frozen=True)
class Question:
    """One conversation to be answered turn by turn.

    Attributes:
        key: unique in its file. history: messages before the first turn. turns: the user's messages to answer.
        row: the row of the file. given: turn -> the data's own answer, where that one is kept (`weight` 0).
    """

    key: str
    history: list[dict[str, str]]
    turns: list[str]
    temperature: float
    row: dict[str, Any]
    given: dict[int, str] = field(default_factory=dict)


def read_questions(
    benchmark: str, path, temperature: float | None, samples: int = 1, reading: dict[str, Any] | None = None
) -> Iterator[Question]:
    """The questions of a file, with their temperatures; of `data` each one `samples` times.

    Args:
        reading: of chat data, the options of `read_conversations`.
    """
    reading = reading or {}
    if benchmark == "data":
        yield from _questions_of_data(path, temperature or 0.0, samples, reading)
        return
    if benchmark == "held_out":
        yield from _questions_held_out(path, temperature or 0.0, reading)
        return
    if benchmark == "chat":
        for row in read_conversations(path, prompts=True, **reading)[0]:
            *history, last = _without_weights(row.messages)
            yield Question(row.id, history, [last["content"]], temperature or 0.0, {"id": row.id})
        return
    if given := [name for name, value in reading.items() if value not in (None, False, "train")]:
        raise InputError(f"{given[0]} for answer: expected chat data, got benchmark {benchmark}. Leave it out.")
    seen = set()
    for name, rows in data_sources(path, "train"):
        for number, row in enumerate(rows):
            check_unicode(f"row {number} of {name}", json.dumps(row, ensure_ascii=False, default=str))
            question = _question(benchmark, f"row {number} of {name}", row, temperature)
            if question.key in seen:
                raise InputError(f"row {number} of {name}: expected each question once, got {question.key!r} again.")
            seen.add(question.key)
            yield question


def _without_weights(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _questions_held_out(path, temperature: float, reading: dict[str, Any]) -> Iterator[Question]:
    """The last prompt of each conversation that has an answer, but where tools are called; `row` has the answer and the
    data's columns."""
    usable = read_conversations(path, **reading)[0]
    found = [one for one in usable if not uses_tools(one.messages)]
    if left_out := len(usable) - len(found):
        logger.warning("%d conversations that call tools are not answered.", left_out)
    for conversation, row in zip(found, rows_of(path, found, reading.get("split", "train")), strict=True):
        *history, prompt, answer = _without_weights(conversation.messages)
        row = json.loads(json.dumps(row, default=str))
        own = {"id": conversation.id, "slice": conversation.slice or "", "data_answer": answer["content"]}
        yield Question(conversation.id, history, [prompt["content"]], temperature, {**row, **own})


def _questions_of_data(path, temperature: float, samples: int, reading: dict[str, Any]) -> Iterator[Question]:
    """Whole conversations, of which every turn is answered but those whose answer is not trained on; none where tools
    are called, whose results follow from the data's own calls."""
    files = [Path(name) for name in names_in(path)]
    if files and all(file.is_file() and not file.stat().st_size for file in files):  # no conversation is this model's
        return
    for conversation in read_conversations(path, **reading)[0]:
        messages = conversation.messages
        history = [message for message in messages if message["role"] == "system"]
        turns = [m["content"] for m in messages if m["role"] == "user" and not uses_tools(messages)]
        answers = [message for message in messages if message["role"] == "assistant"]
        given = {n: a["content"] for n, a in enumerate(answers) if a.get("weight") == 0 and n < len(turns)}
        for n in range(1, samples + 1):
            key = conversation.id if samples == 1 else f"{conversation.id}#{n}"
            row = {"id": key, "slice": conversation.slice or "", "messages": messages}
            yield Question(key, history, turns, temperature, row, given)


def _question(benchmark: str, where: str, row: Any, temperature: float | None) -> Question:
    if benchmark == "arena_hard":
        if not isinstance(row, dict) or "uid" not in row or not isinstance(row.get("prompt"), str):
            raise InputError(f"{where}: expected uid and prompt (text), got {str(row)[:80]!r}. Correct the file.")
        return Question(str(row["uid"]), [], [row["prompt"]], temperature or 0.0, row)
    if benchmark == "alpaca_eval":
        if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
            raise InputError(f"{where}: expected an instruction (text), got {str(row)[:80]!r}. Correct the file.")
        return Question(short_digest(row["instruction"]), [], [row["instruction"]], temperature or 0.0, row)
    turns = row.get("turns") if isinstance(row, dict) else None
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(t, str) for t in turns)
        or "question_id" not in row
        or not isinstance(row.get("category", ""), str)
    ):
        raise InputError(f"{where}: expected question_id, category and turns, got {str(row)[:80]!r}. Correct the file.")
    by_category = TEMPERATURES.get(row.get("category", ""), TEMPERATURE_OF_OTHERS)
    return Question(str(row["question_id"]), [], turns, by_category if temperature is None else temperature, row)


def text_of_answers(
    benchmark: str, output: Path, name: str, asked: list[Question], answers: dict[str, dict], tokenizer
) -> str:
    """The content of an answers' file, in the order of the questions.

    Args:
        output: its path. name: the model's. answers: key -> {turns, tstamp}. tokenizer: counts arena_hard's tokens.
    """
    if benchmark == "alpaca_eval":
        return (
            json.dumps([_alpaca_row(output, name, q, answers[q.key]) for q in asked], ensure_ascii=False, indent=1)
            + "\n"
        )
    if benchmark == "arena_hard":
        return as_lines([_arena_hard_row(output, q, answers[q.key], tokenizer) for q in asked])
    if benchmark == "mt_bench":
        return as_lines([_mt_bench_row(output, q, answers[q.key]) for q in asked])
    return as_lines([{**q.row, **_chat_row(q, answers[q.key])} for q in asked])  # the row of chat is its id


def as_lines(rows: list[dict[str, Any]]) -> str:
    """Rows as JSON, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _alpaca_row(output: Path, name: str, question: Question, entry: dict) -> dict[str, Any]:
    row = {"instruction": question.row["instruction"], "output": entry["turns"][0], "generator": name}
    return {**row, "dataset": question.row.get("dataset", output.stem)}


def _mt_bench_row(output: Path, question: Question, entry: dict) -> dict[str, Any]:
    key = question.row["question_id"]
    row = {"question_id": key, "answer_id": _answer_id(output, key, entry), "model_id": output.stem}
    return {**row, "choices": [{"index": 0, "turns": entry["turns"]}], "tstamp": entry["tstamp"]}


def _answer_id(output: Path, key, entry: dict) -> str:
    return hashlib.sha256(f"{output.stem} {key} {entry['turns']}".encode()).hexdigest()[:22]


def _arena_hard_row(output: Path, question: Question, entry: dict, tokenizer) -> dict[str, Any]:
    key, (text,) = question.row["uid"], entry["turns"]
    thought, _, answer = text.partition("</think>")
    content = {"answer": text}
    if answer.strip():  # the judge sees what follows the thoughts, or all where nothing does
        content = {"thought": thought.removeprefix("<think>").strip(), "answer": answer.strip()}
    messages = [{"role": "user", "content": question.turns[0]}, {"role": "assistant", "content": content}]
    row = {"uid": key, "ans_id": _answer_id(output, key, entry), "model": output.stem, "messages": messages}
    tokens = tokenizer(content["answer"], add_special_tokens=False).input_ids
    metadata = {"token_len": len(tokens), **style_counts(content["answer"])}
    return {**row, "tstamp": entry["tstamp"], "metadata": metadata}


def style_counts(answer: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold texts of Markdown outside code blocks, as Arena-Hard's style control counts them.

    The text of a code block is left out wherever it stands in the answer, its fences stay.
    """
    for block in re.findall(r"```([^`]*)```", answer):
        answer = answer.replace(block, "")
    marks = Counter(re.findall(r"^(#{1,6})\s", answer, re.MULTILINE))
    lists = {"ordered": r"^\s*\d+\.\s", "unordered": r"^\s*[-*+]\s"}
    bold = {"**": r"\*\*[^*\n]+\*\*", "__": r"__[^_\n]+__"}
    return {
        "header_count": {f"h{n}": marks["#" * n] for n in range(1, 7)},
        "list_count": {name: len(re.findall(mark, answer, re.MULTILINE)) for name, mark in lists.items()},
        "bold_count": {name: len(re.findall(mark, answer)) for name, mark in bold.items()},
    }


def _chat_row(question: Question, entry: dict) -> dict[str, Any]:
    messages = [*question.history]
    for turn, text in zip(question.turns, entry["turns"], strict=True):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": text}]
    return {"id": question.key, "messages": messages}


def answered_data(
    asked: list[Question], answers: dict[str, dict], name: str, pivot: ConversationEncoder | None
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Chat data with a model's answers in place of the data's own.

    A conversation keeps the data's answers (`answered_by` is "data", `kept_because` the reason) where one of the
    model's is `empty`, was `cut` at its longest length, held a `special_token` (or its prompt), or is `refused`: its
    prompt by the model's chat template, or the conversation by the pivot's; and where it calls tools (`tool_calls`).

    Args:
        answers: key -> {turns, finished, problems}. name: the model's. pivot: the pivot's encoder; None where nothing
            is asked.
    Returns: rows {id, slice, messages, answered_by, kept_because?, data_answers}; the number of conversations kept, by
        reason.
    """
    rows, kept = [], Counter()
    for question in asked:
        row, messages = question.row, _chat_row(question, answers[question.key])["messages"]
        for turn in question.given:
            messages[len(question.history) + 2 * turn + 1]["weight"] = 0
        problem = _problem(question, answers[question.key], messages, pivot)
        if problem:
            kept[problem] += 1
        own = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        by = {"messages": messages, "answered_by": name}
        if problem:
            by = {"answered_by": "data", "kept_because": problem}
        rows.append({**row, **by, "data_answers": own})
    return rows, dict(sorted(kept.items()))


def _problem(question: Question, entry: dict, messages: list[dict], pivot: ConversationEncoder | None) -> str | None:
    if uses_tools(question.row["messages"]):
        return "tool_calls"
    made = [turn for turn in range(len(question.turns)) if turn not in question.given]
    if problem := next((entry["problems"][turn] for turn in made if entry["problems"][turn]), None):
        return problem
    if not all(entry["turns"][turn].strip() for turn in made):
        return "empty"
    if not all(entry["finished"][turn] for turn in made):
        return "cut"
    assert pivot is not None
    try:
        pivot.check(messages)
    except Unusable:
        return "refused"
    return None
