"""Answers of vLLM and SGLang as people's scripts store them: one JSON object a line (or in a list), with the
log-probabilities of a prompt that is a whole conversation.

Read: completions as a server gives them (`choices[0].prompt_logprobs`), lines of vLLM's `run-batch`
(`response.body`), vLLM's `RequestOutput` as JSON (`prompt_token_ids`, `prompt_logprobs`), SGLang's `/generate`
(`meta_info.input_token_logprobs`, `meta_info.input_top_logprobs`, also without `meta_info`). The prompt's ids are those
of the line (`prompt_token_ids`, `input_ids`, `token_ids`, or SGLang's own), else its `messages` are rendered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.captured_rows import Entry, Forward
from fusechat_fuse.capture.imported_rows import Place
from fusechat_fuse.capture.server import to_top_k
from fusechat_fuse.capture.server_protocols import PROTOCOLS, Answer
from fusechat_fuse.errors import InputError, first_line
from fusechat_fuse.models.identity import add_samples
from fusechat_fuse.text.chat import ConversationEncoder, Encoded
from fusechat_fuse.text.data_files import data_sources
from fusechat_fuse.text.messages import Unusable, clean_messages, row_name

_IDS = ("prompt_token_ids", "input_ids", "token_ids")
_MESSAGES = ("messages", "conversations")


class AnswerLines:
    """The lines of files; `captured_rows.Captures` says what the methods do.

    Args:
        paths: files or directories, as `data_sources` takes them. encoder: of the template that made the prompts.
        vocab_size: ids are below it.
    Raises: InputError where no line holds log-probabilities of a prompt.
    """

    def __init__(self, paths: list[str], encoder: ConversationEncoder, vocab_size: int):
        self.paths, self.encoder, self.vocab_size = paths, encoder, vocab_size
        self.name = ", ".join(Path(path).name for path in paths)
        digest = hashlib.sha256()
        for file in sorted(f for path in map(Path, paths) for f in (path.rglob("*") if path.is_dir() else [path])):
            if file.is_file():
                add_samples(digest, file)
        self.fingerprint = digest.hexdigest()[:16]
        self._lines, self.top_k = Forward(self._rows), 0
        for row in self._rows():
            with suppress(Unusable):
                self.top_k = _prompt_of(row).entries_per_token()
                break
        if not self.top_k:
            raise InputError(
                f"answers in {self.name}: expected prompt_logprobs of vLLM, or input_token_logprobs and "
                "input_top_logprobs of SGLang, got a file without. Ask the server for log-probabilities of the prompt."
            )

    def _rows(self) -> Iterator[Any]:
        for _, rows in data_sources(self.paths, "train"):
            yield from rows

    def entries(self) -> Iterator[Entry]:
        for number, row in enumerate(self._rows()):
            name, problem, ids, messages = row_name(row) or str(number), None, None, None
            try:
                ids, messages = self._conversation(row)
            except Unusable as found:
                problem = found
            yield Entry(Place(number), name, ids, messages, problem)

    def _conversation(self, row: Any) -> tuple[np.ndarray | None, list[dict[str, Any]] | None]:
        """The ids and messages of a line. Raises: Unusable where it has neither, or its entries are of other tokens."""
        prompt = _prompt_of(row)
        messages = clean_messages(row)[0] if any(isinstance(row.get(name), list) for name in _MESSAGES) else None
        ids = prompt.ids
        if ids is None and messages is None:
            raise Unusable("ids", f"expected {' or '.join(_IDS)}, or messages, got neither")
        prompt.check(self.encoder.encode(messages or []).input_ids.tolist() if ids is None else ids)
        return None if ids is None else np.array(ids, np.int32), messages

    def read(self, place: Place, one: Encoded, top_k: int) -> tuple[TopK, dict[str, int]]:
        prompt = _prompt_of(self._lines.at(place.row))
        if (entries := prompt.entries_per_token()) < top_k:
            raise Unusable("entries", f"line {place.row} has {entries} entries per token, the first line {self.top_k}")
        try:
            answer = prompt.answer(one.input_ids.tolist(), one.predicted.tolist(), top_k)
            found = to_top_k(answer, one.input_ids[one.predicted], top_k, self.vocab_size)
        except (InputError, KeyError, TypeError, IndexError, ValueError) as error:
            raise Unusable("logprobs", f"line {place.row}: {first_line(error)}") from error
        return found, {"exact_tokens": len(one.predicted), "renormalised_tokens": 0, "estimated_ce": 0}


class _Prompt:
    """The log-probabilities of one line's prompt.

    Attributes:
        kind: vllm or sglang. own, top: entries of the prompt's tokens and of the most likely ones, one list with vLLM;
            of all tokens, or of the last ones with SGLang. ids: of the prompt, None where the line has none.
    """

    def __init__(self, kind: str, own: list, top: list, ids: list[int] | None):
        self.kind, self.own, self.top, self.ids = kind, own, top, ids

    def entries_per_token(self) -> int:
        """The most likely tokens that every position has. vLLM adds the prompt's own where it is none of them."""
        if self.kind == "sglang":
            return min((len(entries) for entries in self.top[1:]), default=0)
        ranks = [sorted(one["rank"] for one in entries.values()) for entries in self.top[1:]]
        return min((sum(rank == n for n, rank in enumerate(each, start=1)) for each in ranks), default=0)

    def check(self, ids: list[int]) -> None:
        """Raise Unusable where the entries are of other tokens than these."""
        first = len(ids) - len(self.own)  # of the entries; 0 but where SGLang began later
        if first < 0 or (first and self.kind == "vllm"):
            raise Unusable("ids", f"log-probabilities of {len(self.own)} tokens, the text has {len(ids)}")
        for token, entry in zip(ids[first + 1 :], self.own[1:]):
            if entry[1] not in (token, 0) if self.kind == "sglang" else str(token) not in entry:
                raise Unusable("ids", f"the log-probabilities are of other tokens than the text's (token {token})")

    def answer(self, ids: list[int], positions: list[int], top_k: int) -> Answer:
        """What the server's protocol reads at positions of the prompt, or of its beginning where `ids` are cut."""
        if self.kind == "vllm":
            content: dict[str, Any] = {"choices": [{"prompt_logprobs": self.top[: len(ids)]}]}
        else:  # the protocol's own requests begin before the first position
            first = len(self.ids or ids) - len(self.own)
            part = slice(positions[0] - 1 - first, len(ids) - first)
            content = {"meta_info": {"input_token_logprobs": self.own[part], "input_top_logprobs": self.top[part]}}
        return PROTOCOLS[self.kind].answer(content, ids, positions, top_k)


def _prompt_of(row: Any) -> _Prompt:
    """The log-probabilities of a line's prompt. Raises: Unusable where it has none, or they cannot be read."""
    response = row.get("response") if isinstance(row, dict) else None
    body = response.get("body") if isinstance(response, dict) else None
    holders = [holder for holder in (row, response, body) if isinstance(holder, dict)]
    for name in ("choices", "meta_info"):
        inner = [holder.get(name) for holder in holders]
        inner = [part[0] if isinstance(part, list) and part else part for part in inner]
        holders += [part for part in inner if isinstance(part, dict)]
    ids = next((holder[name] for holder in holders for name in _IDS if isinstance(holder.get(name), list)), None)
    has_text = isinstance(row, dict) and any(isinstance(row.get(name), list) for name in _MESSAGES)
    for holder in holders:
        try:
            if entries := holder.get("prompt_logprobs"):
                found = _Prompt("vllm", entries, entries, ids)
            elif (own := holder.get("input_token_logprobs")) and (top := holder.get("input_top_logprobs")):
                whole = [entry[1] for entry in own] if ids is None and not has_text else ids  # else it may begin later
                found = _Prompt("sglang", own, top, whole)
            else:
                continue
            found.entries_per_token()
            return found
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            detail = f"log-probabilities of another form ({type(error).__name__}: {first_line(error)})"
            raise Unusable("no_logprobs", detail) from error
    raise Unusable("no_logprobs", "no log-probabilities of a prompt")
