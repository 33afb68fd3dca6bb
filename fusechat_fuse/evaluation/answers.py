"""`answer`: a model's answers to a benchmark's questions, in the files that its judge reads, or to chat data.

Formats are in `questions.py`. Generation is batched, in the model's own chat template. Finished answers are kept in a
hidden file beside the output, batch by batch: the same command continues a killed run and ends with the same answers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat_fuse.errors import InputError, check_integer, writing
from fusechat_fuse.evaluation.generation import Answer, Generator, turn_ends
from fusechat_fuse.evaluation.questions import (
    MAX_NEW_TOKENS,
    Question,
    answered_data,
    as_lines,
    read_questions,
    text_of_answers,
)
from fusechat_fuse.models.files import is_named, load_config, load_fast_tokenizer, positions_of, with_gguf
from fusechat_fuse.models.identity import identify
from fusechat_fuse.models.loading import check_loading, load_to_device
from fusechat_fuse.processes import Process
from fusechat_fuse.progress import progress
from fusechat_fuse.store.claim import first_difference
from fusechat_fuse.store.files import short_digest, write_atomic
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.data_files import names_in
from fusechat_fuse.text.templates import native_template

if TYPE_CHECKING:
    from fusechat_fuse.evaluation.served import ServedGenerator

logger = logging.getLogger(__name__)


def answer(
    model,
    questions,
    output,
    *,
    benchmark: str,
    pivot=None,
    template: str = "pivot",
    tokenizer=None,
    temperature: float | None = None,
    samples: int = 1,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    device_map: str | dict | None = None,
    attn_implementation: str | None = None,
    gguf_file: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    trust_remote_code: bool = False,
    server: str | list[str] | None = None,
    server_kind: str = "vllm",
    server_model: str | None = None,
    server_requests: int = 32,
    split: str = "train",
    limit: int | None = None,
    shuffle_seed: int | None = None,
    messages_column: str | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Answer a benchmark's questions, or the prompts of chat data.

    Args:
        model: directory, Hub name, or a loaded causal language model (then give `tokenizer`).
        questions: the benchmark's file; for chat, held_out and data anything `load_conversations` takes.
        output: the answers' file; the judges of mt_bench and arena_hard take its name without .jsonl as the model's.
        benchmark: mt_bench, alpaca_eval, arena_hard, chat (the last user message of each conversation), held_out (the
            last turn that the data answer, to be scored: `scoring.py`) or data (every turn, for training on them).
        pivot: for data: the model whose chat template must take the answers (None: the answering model). Where it
            refuses one, or one is empty, cut at max_new_tokens or unusable otherwise (`questions.answered_data`), the
            conversation keeps the data's answers.
        template: for data: the pivot's chat template, as `represent` takes it.
        temperature: for all questions; 0 is greedy. None: by category for mt_bench, else greedy.
        samples: for data: answers to each conversation, each a conversation ID#1, ID#2, ... of its own.
        max_new_tokens: per answer; None: 1024, for alpaca_eval 2048, for arena_hard 4096; fewer if the model's
            positions run out.
        batch_size: questions answered at once. seed: for sampling at temperatures above 0.
        dtype, device_map, attn_implementation, gguf_file, load_in_4bit, load_in_8bit, trust_remote_code: as
            `represent` takes them; without a device_map, the GPU if there is one.
        server, server_kind, server_model, server_requests: inference servers that answer instead of this process, as
            `represent` takes them; `model` then gives tokenizer, template and generation settings.
        split, limit, shuffle_seed, messages_column, strict: for chat data, as `represent` takes them.
    Returns: counts: questions, answered_before, empty_answers, empty_by_problem (special_token: the question holds the
        text of one; refused: by the model's chat template); for data also kept_from_data, by reason; with a server
        refused_prompts, of this start.
    Raises: InputError for a bad file or option, a model without a chat template, or another run's answers at `output`.
    """
    load_in = check_options(locals())
    output, model = Path(output), with_gguf(model, gguf_file)
    _check_is_alone()
    reading = {"split": split, "limit": limit, "shuffle_seed": shuffle_seed, "messages_column": messages_column}
    asked = _questions(benchmark, questions, temperature, samples, {**reading, "strict": strict})
    tokenizer = load_fast_tokenizer(model, trust_remote_code) if tokenizer is None else tokenizer
    options = {"benchmark": benchmark, "max_new_tokens": max_new_tokens or MAX_NEW_TOKENS[benchmark], "seed": seed}
    loading = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    loading |= {"trust_remote_code": trust_remote_code, "load_in": load_in}
    servers = _connect(server, server_kind, server_model, server_requests)
    identity = _identity(model, loading, servers)
    asking = _identity_of_asking(model, tokenizer, asked, trust_remote_code)
    kept = _Kept(output, {**options, "batch_size": batch_size, **identity, **asking})
    encoder = _encoder(tokenizer, pivot, template, trust_remote_code) if benchmark == "data" and asked else None
    batches = [batch for batch in _batches(asked, batch_size) if any(q.key not in kept.answers for q in batch)]
    counts: dict[str, Any] = {"questions": len(asked), "answered_before": len(kept.answers)}
    if batches:
        generator = _generator(model, tokenizer, options["max_new_tokens"], loading, servers)
        _answer_batches(generator, batches, kept, seed)
        counts |= {"refused_prompts": len(refused)} if (refused := getattr(generator, "refused", None)) else {}
    if benchmark == "data":
        rows, counts["kept_from_data"] = answered_data(asked, kept.answers, identity["name"], encoder)
        text = as_lines(rows)
    else:
        text = text_of_answers(benchmark, output, identity["name"], asked, kept.answers, tokenizer)
    write_atomic(output, text.encode())
    counts |= _empty_answers(kept.answers)
    _warn(counts)
    return counts


def _check_is_alone() -> None:
    if (count := Process.current().count) > 1:
        raise InputError(f"answer in {count} processes: expected one. Start it without a launcher.")


def _encoder(tokenizer, pivot, template: str, trust_remote_code: bool) -> ConversationEncoder:
    """The encoder of the pivot, or of the answering model."""
    return ConversationEncoder(tokenizer if pivot is None else load_fast_tokenizer(pivot, trust_remote_code), template)


def check_options(options: dict[str, Any]) -> str | None:
    """Raise InputError for options of `answer` that are wrong whatever is asked; returns `load_in`."""
    benchmark, temperature, samples = (options[name] for name in ("benchmark", "temperature", "samples"))
    if benchmark not in MAX_NEW_TOKENS:
        raise InputError(
            f"value for benchmark: expected one of {', '.join(MAX_NEW_TOKENS)}, got {benchmark!r}. Use one."
        )
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise InputError(f"temperature for answer: expected a number from 0, got {temperature}. Change it.")
    for name in ("batch_size", "samples", "max_new_tokens"):
        check_integer(f"{name} for answer", 1 if options[name] is None else options[name])
    if samples > 1 and (benchmark != "data" or not temperature):
        raise InputError(
            f"samples for answer: expected 1 but with benchmark data and a temperature above 0, got {samples}. "
            "Set both."
        )
    return check_loading("answer", options)


def _questions(benchmark: str, data, temperature: float | None, samples: int, reading: dict) -> list[Question]:
    asked = list(read_questions(benchmark, data, temperature, samples, reading))
    if not asked and benchmark != "data":
        named = ", ".join(names_in(data))
        raise InputError(f"questions {named}: expected at least one, got none. Give a file with questions.")
    return asked


def _connect(server, kind: str, model: str | None, requests: int):
    """The servers; None where none is named."""
    if server is None:
        return None
    from fusechat_fuse.models.servers import Servers

    return Servers("answer", server, kind=kind, model=model, requests=requests)


def _identity(model, loading: dict[str, Any], servers) -> dict[str, Any]:
    """Name and version of what answers: the weights as they are loaded, or the model as it is served."""
    if servers is not None:
        return {"name": servers.served.name, "server": f"{servers.kind} {servers.served.version}"}
    load_in = {"load_in": loading["load_in"]} if loading["load_in"] else {}
    return {**identify(model), "dtype": loading["dtype"], **load_in}


def _generator(model, tokenizer, max_new_tokens: int, loading: dict[str, Any], servers) -> Generator | ServedGenerator:
    if servers is None:
        return Generator(load_to_device(model, **loading), tokenizer, max_new_tokens)
    from fusechat_fuse.evaluation.served import ServedGenerator

    trust = {"trust_remote_code": loading["trust_remote_code"]}
    positions = positions_of(load_config(model, **trust))
    return ServedGenerator(servers, tokenizer, max_new_tokens, turn_ends(model, **trust), positions)


def _empty_answers(answers: dict[str, dict]) -> dict[str, Any]:
    """How many answers are empty; of these by problem, how many have one."""
    empty = [
        problem
        for entry in answers.values()
        for turn, problem in zip(entry["turns"], entry["problems"], strict=True)
        if not turn.strip()
    ]
    problems = dict(sorted(Counter(filter(None, empty)).items()))
    return {"empty_answers": len(empty), **({"empty_by_problem": problems} if problems else {})}


def _warn(counts: dict[str, Any]) -> None:
    """Warn of answers that are of no use."""
    if counts["empty_answers"]:
        known = "".join(f", {count} {problem}" for problem, count in counts.get("empty_by_problem", {}).items())
        logger.warning(
            "%d answers are empty%s: the prompt left no positions for them, holds the text of a special token "
            "(special_token) or is refused by the model's chat template (refused); or the model ended its turn.",
            *(counts["empty_answers"], known and f" ({known[2:]})"),
        )
    if refused := counts.get("refused_prompts"):
        logger.warning("%d prompts were refused by the server: their answers are empty.", refused)
    if kept := counts.get("kept_from_data"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in kept.items())
        logger.warning(
            "%d of %d conversations keep the data's answers; of the model's, these were unusable: %s.",
            *(sum(kept.values()), counts["questions"], reasons),
        )


def _identity_of_asking(model, tokenizer, asked: list[Question], trust_remote_code: bool) -> dict[str, str]:
    """Digests of what decides answers besides the weights: questions, tokenizer, chat template, what ends a turn.

    Where nothing is asked, a model without a chat template is as good as another.
    """
    questions = short_digest(json.dumps([asdict(question) for question in asked]))
    if not asked:
        return {"questions": questions}
    name = str(model) if is_named(model) else "the model"
    remedy = "Save one with its tokenizer (tokenizer.chat_template)"
    template = f"{tokenizer.chat_template} {native_template(tokenizer, name, remedy).sha256}"
    return {
        "questions": questions,
        "tokenizer": short_digest(tokenizer.backend_tokenizer.to_str()),
        "template": short_digest(template),
        "ends": short_digest(json.dumps(turn_ends(model, trust_remote_code=trust_remote_code))),
    }


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
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())
        self.answers |= {entry["key"]: entry for entry in entries}


def _answer_batches(
    generator: Generator | ServedGenerator, batches: list[list[Question]], kept: _Kept, seed: int
) -> None:
    """Answer batch after batch; what is sampled depends on the seed and the batch alone."""
    import torch

    with progress(total=sum(map(len, batches)), desc="answer", unit="question") as bar:
        for batch in batches:
            name = f"{seed} {batch[0].key} {len(batch)}"
            torch.manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:15], 16))
            answers = _answer_batch(generator, batch)
            now = time.time()
            entries = [
                {
                    "key": q.key,
                    "turns": [a.text for a in turns],
                    "finished": [a.finished for a in turns],
                    "problems": [a.problem for a in turns],
                    "tstamp": now,
                }
                for q, turns in zip(batch, answers, strict=True)
            ]
            kept.add([entry for entry in entries if entry["key"] not in kept.answers])
            bar.update(len(batch))


def _answer_batch(generator: Generator | ServedGenerator, batch: list[Question]) -> list[list[Answer]]:
    """The answers of every question, turn by turn, each after the answers before it."""
    messages, answers = [list(question.history) for question in batch], [[] for _ in batch]
    for turn in range(max(len(question.turns) for question in batch)):
        going = [n for n, question in enumerate(batch) if turn < len(question.turns)]
        for n in going:
            messages[n].append({"role": "user", "content": batch[n].turns[turn]})
        asked = [n for n in going if turn not in batch[n].given]
        made = dict(zip(asked, generator.generate([messages[n] for n in asked], batch[0].temperature), strict=True))
        for n in going:
            answers[n].append(made[n] if n in made else Answer(batch[n].given[turn], True))
            messages[n].append({"role": "assistant", "content": answers[n][-1].text})
    return answers
