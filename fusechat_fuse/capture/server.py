"""Log-probabilities of prompts from inference servers, vLLM or SGLang, in place of a model in this process.

Prompts go as the ids that our own encoder made, so positions are exact; the cross-entropy is exact because both servers
give the log-probability of the prompt's own token beside the k most likely ones. A conversation that is refused again
and again by a server that answers another prompt is left out and counted.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import numpy as np

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.server_protocols import PROTOCOLS, Answer
from fusechat_fuse.errors import InputError, first_line
from fusechat_fuse.models.identity import Identity
from fusechat_fuse.models.servers import NotAnswered, Servers
from fusechat_fuse.store.files import short_digest
from fusechat_fuse.text.chat import Encoded
from fusechat_fuse.text.messages import Unusable

logger = logging.getLogger(__name__)
_NOT_MEASURED = -9999.0  # what servers write for minus infinity: this, or the least number of a float type
_PROBE_TEXT = "The three words"
_TOLERANCE = 1e-2  # log-probabilities of one prompt differ by so much between batches


class ServerRunner:
    """Distributions of conversations from servers of one model, each tried with a short prompt.

    Args:
        servers: of one model. tokenizer: the model's own.
        top_k: entries per predicted token. vocab_size: ids are below it.
    Attributes: identity: the model as it is served. max_length: tokens of a prompt, None where the servers do not say.
    Raises: InputError where a server gives no log-probabilities of prompts, alters them, has another tokenizer, or
        serves another model than the first.
    """

    def __init__(self, servers: Servers, *, tokenizer, top_k: int, vocab_size: int):
        self.servers, self.protocol, self.max_length = servers, PROTOCOLS[servers.kind], servers.max_length
        self.top_k, self.vocab_size, self.padded = top_k, vocab_size, 0
        if servers.kind == "vllm" and servers.served.beside_adapters:
            logger.warning(
                "server %s has LoRA adapters: vLLM's log-probabilities of prompts may leave out what an adapter adds "
                "to lm_head (vllm#51594), or end the server (vllm#29955). Serve the merged model by itself.",
                servers.urls[0],
            )
        self._probe_ids = tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"]
        likely = servers.probe(lambda url: self._probe(url, tokenizer))
        answered = [servers.kind, servers.served.name, servers.served.version, self._probe_ids, likely]
        self.identity: Identity = {"name": servers.served.name, "fingerprint": short_digest(json.dumps(answered))}

    def __call__(self, encoded: list[Encoded], progress) -> list[TopK | Unusable]:
        """A TopK for each conversation, in order; Unusable for one that the servers refuse."""
        begun = time.monotonic()
        found = self.servers.map(lambda one: self._distributions(one, progress), encoded)
        tokens = sum(len(one.input_ids) for one in encoded)
        self.padded += tokens
        progress.set_postfix_str(f"{tokens / max(time.monotonic() - begun, 1e-9):,.0f} tokens/s", refresh=False)
        return found

    def _body(self, ids: list[int], first: int, temperature: float = 0.0) -> dict[str, Any]:
        return self.protocol.body(self.servers.served, ids, first, self.top_k, temperature)

    def _distributions(self, one: Encoded, progress) -> TopK | Unusable:
        ids, positions = one.input_ids.tolist(), one.predicted.tolist()
        try:
            answer = self.servers.ask(self._body(ids, positions[0]), self._body(self._probe_ids, 1))
        except NotAnswered as error:
            return Unusable("non_finite", f"refused by the server: {error}")
        finally:
            progress.update(1)
        try:
            found = self.protocol.answer(answer, ids, positions, self.top_k)
            return to_top_k(found, one.input_ids[one.predicted], self.top_k, self.vocab_size)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise RuntimeError(
                f"answer of a server: expected log-probabilities of {len(ids)} tokens, got something else "
                f"({type(error).__name__}: {first_line(error)}). Look at its version."
            ) from error

    def _probe(self, url: str, tokenizer) -> list[int]:
        """The most likely tokens of a short prompt, whose log-probabilities must be the model's."""
        ids = self._probe_ids
        positions, advice = list(range(1, len(ids))), self.protocol.advice(self.top_k)
        try:
            bodies = [self._body(ids, 1, temperature) for temperature in (0.0, 2.0)]
            contents = [self.servers.try_out(url, body, advice) for body in bodies]
            answers = [self.protocol.answer(content, ids, positions, self.top_k) for content in contents]
            own = np.array(ids[1:])
            top, at_temperature_2 = (to_top_k(answer, own, self.top_k, self.vocab_size) for answer in answers)
        except InputError:
            raise
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(
                f"server {url}: expected log-probabilities of the prompt, got an answer without them (llama.cpp's "
                "server gives none: take --gguf_file). Serve the model with vLLM or SGLang."
            ) from error
        for token, text in zip(ids[1:], answers[0].texts):
            own = tokenizer.decode([token])
            if text is not None and text.strip() != own.strip():
                raise InputError(
                    f"server {url}: expected the given model's tokenizer, got one where token {token} is {text!r} and "
                    f"not {own!r}. Give --model_name_or_path of the model that is served."
                )
        mass = np.exp(top.logprobs.astype(np.float64)).sum(1)
        altered = np.abs(top.ce - at_temperature_2.ce).max() > _TOLERANCE or mass.max() > 1 + _TOLERANCE
        if altered or not np.isfinite(top.ce).all():
            raise InputError(
                f"server {url}: expected the model's own log-probabilities, got some that temperature or a logits "
                "processor alters. Serve it with raw log-probabilities and without processors."
            )
        return top.ids[:, 0].tolist()


def to_top_k(answer: Answer, own: np.ndarray, top_k: int, vocab_size: int) -> TopK:
    """An answer as arrays. What is no measurement (NaN, above 0, a stand-in for minus infinity) is not finite.

    Args:
        own: ids [P] of the actual tokens.
    Raises: InputError where an answer contradicts itself.
    """
    ids, logprobs = np.array(answer.ids, np.int64), np.array(answer.logprobs, np.float32)
    logp = np.array(answer.actual, np.float32)
    if ids.shape[1:] != (top_k,):
        raise ValueError(f"entries of shape {ids.shape} for {top_k} per token")
    if (beyond := ids[(ids < 0) | (ids >= vocab_size)]).size:
        raise InputError(
            f"answer of a server: expected token ids below the model's {vocab_size}, got {beyond[0]}. Give "
            "--model_name_or_path of the model that is served."
        )
    both = np.column_stack([logprobs, logp])
    measured = np.all((both > _NOT_MEASURED) & (both < _TOLERANCE), axis=1)
    _check_agreement(ids[measured], logprobs[measured], own[measured], logp[measured], -np.log(vocab_size))
    return TopK(ids.astype(np.int32), np.minimum(logprobs, 0), np.where(measured, np.maximum(-logp, 0), np.nan))


def _check_agreement(
    ids: np.ndarray, logprobs: np.ndarray, own: np.ndarray, logp: np.ndarray, least: float = -np.inf
) -> None:
    """Raise InputError unless the entries [P, K] are probabilities, the largest of them at least `least` (its
    logarithm), and the actual tokens' log-probabilities [P] equal their entries, or are below all where there is none.
    """
    is_own = ids == own[:, None]
    listed = np.where(is_own, logprobs, -np.inf).max(axis=1, initial=-np.inf)
    listed = np.where(is_own.any(axis=1), listed, np.minimum(logp, logprobs.min(axis=1, initial=0.0)))
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    largest = logprobs.max(axis=1, initial=-np.inf)
    for wrong, expected, got in (
        (
            largest < least - _TOLERANCE,  # logits, which may all be below 0
            f"a log-probability of at least {least:.2f} for the most likely token",
            lambda n: f"{largest[n]:.2f}",
        ),
        (mass > 1 + _TOLERANCE, "probabilities of at most 1 in all", lambda n: f"{mass[n]:.2f}"),
        (
            np.abs(listed - logp) > _TOLERANCE,
            "the prompt's token and the most likely ones to agree",
            lambda n: f"log-probabilities {logp[n]:.2f} and {listed[n]:.2f}",
        ),
    ):
        if wrong.any():
            first = int(np.argmax(wrong))
            raise InputError(
                f"answer of a server: expected {expected}, got {got(first)} (token {own[first]}). Serve raw "
                "log-probabilities, or another version."
            )
