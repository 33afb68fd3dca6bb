"""`answer`: a model's answers to a benchmark's questions, in the files that its judge reads.

    mt_bench     questions (JSONL): question_id, category, turns, reference?
                 answers (JSONL): question_id, answer_id, model_id, choices [{index, turns}], tstamp; model_id is the
                 file's name without .jsonl. The temperature depends on the category.
    alpaca_eval  questions (JSON list): instruction, dataset?
                 answers (JSON list): instruction, output, generator, dataset
    chat         questions: chat data as `represent` reads them, or prompts alone; each last user message is answered
                 answers (JSONL): id, messages

Generation is batched, in the model's own chat template. Finished answers are kept in a hidden file beside the output,
batch by batch: the same command continues a killed run and ends with the same answers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError, check_integer
from fusechat_fuse.models.files import adapter_base, is_named, load_fast_tokenizer, model_file, positions_of
from fusechat_fuse.models.identity import identify
from fusechat_fuse.models.loading import load_model
from fusechat_fuse.store.claim import first_difference
from fusechat_fuse.store.files import short_digest, write_atomic
from fusechat_fuse.text.conversations import read_conversations
from fusechat_fuse.text.data_files import data_sources
from fusechat_fuse.text.messages import check_unicode
from fusechat_fuse.text.templates import added_texts, native_template

logger = logging.getLogger(__name__)
TEMPERATURES = dict.fromkeys(("writing", "roleplay"), 0.7) | dict.fromkeys(("stem", "humanities"), 0.1)
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
TEMPERATURE_OF_OTHERS = 0.7
MAX_NEW_TOKENS = {"mt_bench": 1024, "alpaca_eval": 2048, "chat": 1024}  # the judges' own limits
_PLACEHOLDER = "QZ1ZQ"  # stands for the answer in a rendered prompt


@dataclass(frozen=True)
class Question:
    """One conversation to be answered turn by turn.

    Attributes:
        key: unique in its file. history: messages before the first turn. turns: the user's messages to answer.
        row: the row of the file.
    """

    key: str
    history: list[dict[str, str]]
    turns: list[str]
    temperature: float
    row: dict[str, Any]


def answer(
    model,
    questions,
    output,
    *,
    benchmark: str,
    tokenizer=None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    device_map: str | dict | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Answer a benchmark's questions.

    Args:
        model: directory, Hub name, or a loaded causal language model (then give `tokenizer`).
        questions: the benchmark's file; for chat anything `load_conversations` takes, with or without answers.
        output: the answers' file; for mt_bench the judge takes its name without .jsonl as the model's name.
        benchmark: mt_bench, alpaca_eval or chat.
        temperature: for all questions; 0 is greedy. None: by category for mt_bench, else greedy.
        max_new_tokens: per answer; None: 1024, for alpaca_eval 2048; fewer if the model's positions run out.
        batch_size: questions answered at once. seed: for sampling at temperatures above 0.
        dtype, device_map, trust_remote_code: as transformers takes them; without a device_map, the GPU if there is one.
    Returns: counts: questions, answered_before, empty_answers.
    Raises: InputError for a bad file or option, a model without a chat template, or another run's answers at `output`.
    """
    if benchmark not in MAX_NEW_TOKENS:
        raise InputError(
            f"value for benchmark: expected one of {', '.join(MAX_NEW_TOKENS)}, got {benchmark!r}. Use one."
        )
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise InputError(f"temperature for answer: expected a number from 0, got {temperature}. Change it.")
    check_integer("batch_size for answer", batch_size)
    check_integer("max_new_tokens for answer", MAX_NEW_TOKENS[benchmark] if max_new_tokens is None else max_new_tokens)
    output, asked = Path(output), list(_questions(benchmark, questions, temperature))
    if not asked:
        raise InputError(f"questions {questions}: expected at least one, got none. Give a file with questions.")
    if tokenizer is None:
        tokenizer = load_fast_tokenizer(model, trust_remote_code)
    options = {"benchmark": benchmark, "max_new_tokens": max_new_tokens or MAX_NEW_TOKENS[benchmark], "seed": seed}
    options |= {"batch_size": batch_size, "dtype": dtype}
    identity = identify(model)
    digest = short_digest(json.dumps([asdict(question) for question in asked]))
    kept = _Kept(output, {**options, **identity, "questions": digest, **_generation_identity(model, tokenizer)})
    batches = [batch for batch in _batches(asked, batch_size) if any(q.key not in kept.answers for q in batch)]
    before = len(kept.answers)
    if batches:
        if is_named(model):
            model = _load_to_device(model, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)
        _answer_batches(_Generator(model, tokenizer, options["max_new_tokens"]), batches, kept, seed)
    _write(benchmark, output, identity["name"], asked, kept.answers)
    empty = sum(not turn.strip() for question in asked for turn in kept.answers[question.key]["turns"])
    if empty:
        logger.warning(
            "%d answers are empty: the prompt left no positions for them, or the model ended its turn at once.", empty
        )
    return {"questions": len(asked), "answered_before": before, "empty_answers": empty}


def _generation_identity(model, tokenizer) -> dict[str, str]:
    """Digests of what decides answers besides the weights: tokenizer, chat template, generation settings."""
    if is_named(model):
        files = [model_file(name, "generation_config.json") for name in (model, adapter_base(model)) if name]
        settings = b"".join(file.read_bytes() for file in files if file)
    else:
        settings = model.generation_config.to_json_string()
    template = f"{tokenizer.chat_template} {native_template(tokenizer).sha256}"
    return {
        "tokenizer": short_digest(tokenizer.backend_tokenizer.to_str()),
        "template": short_digest(template),
        "generation": short_digest(settings),
    }


def _questions(benchmark: str, path, temperature: float | None) -> Iterator[Question]:
    """The questions of a file, with their temperatures."""
    if benchmark == "chat":
        for row in read_conversations(path, prompts=True)[0]:
            *history, last = [{"role": m["role"], "content": m["content"]} for m in row.messages]
            yield Question(row.id, history, [last["content"]], temperature or 0.0, {"id": row.id})
        return
    seen = set()
    for name, rows in data_sources(str(path), "train"):
        for number, row in enumerate(rows):
            check_unicode(f"row {number} of {name}", json.dumps(row, ensure_ascii=False, default=str))
            question = _question(benchmark, f"row {number} of {name}", row, temperature)
            if question.key in seen:
                raise InputError(f"row {number} of {name}: expected each question once, got {question.key!r} again.")
            seen.add(question.key)
            yield question


def _question(benchmark: str, where: str, row: Any, temperature: float | None) -> Question:
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


def _batches(asked: list[Question], size: int) -> list[list[Question]]:
    """Batches of questions with one temperature, in the file's order; the same in every start."""
    found = []
    for temperature in sorted({question.temperature for question in asked}):
        group = [question for question in asked if question.temperature == temperature]
        found += [group[first : first + size] for first in range(0, len(group), size)]
    return found


class _Kept:
    """The file of finished answers: a line that identifies the run, then one line per answer."""

    def __init__(self, output: Path, run: dict[str, Any]):
        self.path, self.answers = output.with_name(f".{output.name}.answers"), {}
        header = json.dumps({"run": run}, sort_keys=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            if output.exists():
                raise InputError(
                    f"output {output}: expected none or this run's, got a file. Name another or remove it."
                )
            write_atomic(self.path, f"{header}\n".encode())
            return
        *lines, rest = self.path.read_bytes().split(b"\n")  # not splitlines: an answer may hold other line ends
        self._check(b"".join(lines[:1]), run)
        for n, line in enumerate(lines[1:], start=1):
            try:
                entry = json.loads(line)
                self.answers[entry["key"]] = entry
            except (ValueError, TypeError, KeyError):  # a full disk or a power failure leaves zeros
                lines, rest = lines[:n], line
                break
        if rest:  # what follows the last whole line is answered again
            write_atomic(self.path, b"".join(line + b"\n" for line in lines))

    def _check(self, first: bytes, run: dict[str, Any]) -> None:
        """Raise InputError unless the file's first line names this run."""
        try:
            difference = first_difference(json.loads(first)["run"], run)
        except (ValueError, KeyError, TypeError):
            difference = "its first line cannot be read"
        if difference:
            raise InputError(
                f"answers in {self.path}: expected this run's, got another's ({difference}). Name another output, or "
                "remove that file."
            )

    def add(self, entries: list[dict]) -> None:
        """Append the answers of a batch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())
        self.answers |= {entry["key"]: entry for entry in entries}


def _load_to_device(model, **loading):
    import torch

    loaded = load_model(model, **loading)
    return loaded.cuda() if loading["device_map"] is None and torch.cuda.is_available() else loaded


class _Generator:
    """A model with its chat template: conversations in, answers out."""

    def __init__(self, model, tokenizer, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.template = native_template(tokenizer)
        ends = model.generation_config.eos_token_id
        found = {ends} if isinstance(ends, int) else set(ends or ())
        found |= {tokenizer.eos_token_id, added_texts(tokenizer).get(self.template.end_of_turn)} - {None}
        self.ends = sorted(found)
        self.padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.ends[0]
        self.positions = positions_of(model.config)

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids up to where the answer begins."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            text = self.template.render([*messages, {"role": "assistant", "content": _PLACEHOLDER}]).partition(
                _PLACEHOLDER
            )[0]
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def generate(self, conversations: list[list[dict[str, str]]], temperature: float) -> list[str]:
        """One answer per conversation, of as many tokens as its own prompt leaves positions for."""
        prompts = [self.prompt(messages) for messages in conversations]
        rooms = [min(self.max_new_tokens, (self.positions or sys.maxsize) - len(prompt)) for prompt in prompts]
        together = [n for n, room in enumerate(rooms) if room == self.max_new_tokens]
        texts = [""] * len(prompts)
        for group in ([together] if together else []) + [[n] for n in range(len(prompts)) if n not in together]:
            if rooms[group[0]] > 0:
                found = self._complete([prompts[n] for n in group], rooms[group[0]], temperature)
                for n, text in zip(group, found, strict=True):
                    texts[n] = text
        return texts

    def _complete(self, prompts: list[list[int]], room: int, temperature: float) -> list[str]:
        """One answer of at most `room` tokens per prompt."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.padding)
        mask = torch.zeros_like(ids)
        for n, prompt in enumerate(prompts):
            ids[n, longest - len(prompt) :], mask[n, longest - len(prompt) :] = torch.tensor(prompt), 1
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=room,
                eos_token_id=self.ends,
                pad_token_id=self.padding,
                **sampling,
            )
        return [
            text.strip() for text in self.tokenizer.batch_decode(found[:, longest:].cpu(), skip_special_tokens=True)
        ]


def _answer_batches(generator: _Generator, batches: list[list[Question]], kept: _Kept, seed: int) -> None:
    """Answer batch after batch; what is sampled depends on the seed and the batch alone."""
    import torch
    from tqdm.auto import tqdm

    with tqdm(total=sum(map(len, batches)), desc="answer", unit="question") as progress:
        for batch in batches:
            name = f"{seed} {batch[0].key} {len(batch)}"
            torch.manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:15], 16))
            messages, answers = [list(question.history) for question in batch], [[] for _ in batch]
            for turn in range(max(len(question.turns) for question in batch)):
                open_rows = [n for n, question in enumerate(batch) if turn < len(question.turns)]
                for n in open_rows:
                    messages[n].append({"role": "user", "content": batch[n].turns[turn]})
                texts = generator.generate([messages[n] for n in open_rows], batch[0].temperature)
                for n, text in zip(open_rows, texts, strict=True):
                    messages[n].append({"role": "assistant", "content": text})
                    answers[n].append(text)
            now = time.time()
            entries = [{"key": q.key, "turns": turns, "tstamp": now} for q, turns in zip(batch, answers, strict=True)]
            kept.add([entry for entry in entries if entry["key"] not in kept.answers])
            progress.update(len(batch))


def _write(benchmark: str, output: Path, name: str, asked: list[Question], answers: dict[str, dict]) -> None:
    """Write the answers' file, in the order of the questions."""
    rows = []
    for question in asked:
        entry = answers[question.key]
        if benchmark == "alpaca_eval":
            row = {"instruction": question.row["instruction"], "output": entry["turns"][0], "generator": name}
            rows.append({**row, "dataset": question.row.get("dataset", output.stem)})
        elif benchmark == "mt_bench":
            key = question.row["question_id"]
            answer_id = hashlib.sha256(f"{output.stem} {key} {entry['turns']}".encode()).hexdigest()[:22]
            row = {"question_id": key, "answer_id": answer_id, "model_id": output.stem}
            rows.append({**row, "choices": [{"index": 0, "turns": entry["turns"]}], "tstamp": entry["tstamp"]})
        else:
            messages = [*question.history, {"role": "user", "content": question.turns[0]}]
            messages.append({"role": "assistant", "content": entry["turns"][0]})
            rows.append({"id": question.key, "messages": messages})
    if benchmark == "alpaca_eval":
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(output, text.encode())
