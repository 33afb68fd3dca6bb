"""Log-probabilities of prompts from inference servers, vLLM or SGLang, in place of a model in this process.

Prompts go as the ids that our own encoder made, so positions are exact; the cross-entropy is exact because both servers
give the log-probability of the prompt's own token beside the k most likely ones. Several servers of one model share the
work, each with many requests in flight. A server that does not answer is asked again later, less and less often, while
the others do its work. A conversation that is refused again and again by a server that answers another prompt is left
out and counted.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import numpy as np
import orjson

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.server_protocols import PROTOCOLS, Answer, NotAnswered
from fusechat_fuse.errors import InputError, check_integer, first_line
from fusechat_fuse.models.identity import Identity
from fusechat_fuse.store.files import short_digest
from fusechat_fuse.text.chat import Encoded
from fusechat_fuse.text.messages import Unusable

logger = logging.getLogger(__name__)
API_KEY = "FUSECHAT_SERVER_API_KEY"  # environment variable
NO_ANSWER_TIMEOUT = 300.0  # seconds without an answer from any server
_BACK_OFF, _MAX_BACK_OFF = 0.5, 30.0  # seconds between two attempts on one server
_BUSY = (408, 425, 429, 502, 503, 504)  # statuses of a server that may answer later
_REFUSALS = 3  # of one prompt, before the server is tried with another
_NOT_MEASURED = -9999.0  # what servers write for minus infinity: this, or the least number of a float type
_PROBE_TEXT = "The three words"
_TOLERANCE = 1e-2  # log-probabilities of one prompt differ by so much between batches


class _Busy(Exception):
    """A server that may answer later."""


class ServerRunner:
    """Distributions of conversations from servers of one model, each tried with a short prompt.

    Args:
        server: URLs, a list or separated by commas. kind: vllm or sglang. tokenizer: the model's own.
        model: the name to ask for; None: the servers serve one only.
        top_k: entries per predicted token. requests: in flight at each server. vocab_size: ids are below it.
    Attributes: identity: the model as it is served. max_length: tokens of a prompt, None where the servers do not say.
    Raises: InputError where a server is not of this kind, gives no log-probabilities of prompts, alters them, has
        another tokenizer, or serves another model than the first.
    """

    def __init__(
        self, *, server: str | list[str], kind: str, model: str | None, tokenizer, top_k, requests, vocab_size
    ):
        if kind not in PROTOCOLS:
            raise InputError(f"server_kind for represent: expected one of {', '.join(PROTOCOLS)}, got {kind!r}.")
        urls = [url.rstrip("/") for url in (server.split(",") if isinstance(server, str) else server) if url]
        if not urls or not all(map(_is_url, urls)):
            raise InputError(f"server for represent: expected URLs such as http://localhost:8000, got {server!r}.")
        check_integer("server_requests for represent", requests)
        self.protocol, self.top_k, self.vocab_size = PROTOCOLS[kind], top_k, vocab_size
        self.requests, self.urls, self.padded = requests, urls, 0
        self._free: queue.Queue[str] = queue.Queue()
        self._failures: dict[str, int] = dict.fromkeys(urls, 0)
        self._answered = time.monotonic()
        self._key, limits = _api_key(), httpx.Limits(max_connections=requests * len(urls))
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(timeout=httpx.Timeout(600.0, connect=10.0), limits=limits, headers=headers)
        self._probe_ids = tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"]
        identities, lengths = zip(*(self._probe(url, tokenizer, model) for url in urls))
        self.identity: Identity = identities[0]
        self.max_length: int | None = min(filter(None, lengths), default=None)
        for url, identity in zip(urls, identities):
            if identity != self.identity:
                raise InputError(
                    f"server {url}: expected the model of {urls[0]} ({self.identity['name']}), got another answer "
                    f"({identity['name']}). Serve one model of one version."
                )
        for url in urls * requests:
            self._free.put(url)

    def __call__(self, encoded: list[Encoded], progress) -> list[TopK | Unusable]:
        """A TopK for each conversation, in order; Unusable for one that the servers refuse."""
        begun = time.monotonic()
        with ThreadPoolExecutor(self.requests * len(self.urls)) as pool:
            futures = [pool.submit(self._distributions, one, progress) for one in encoded]
            try:
                found = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        tokens = sum(len(one.input_ids) for one in encoded)
        self.padded += tokens
        progress.set_postfix_str(f"{tokens / max(time.monotonic() - begun, 1e-9):,.0f} tokens/s", refresh=False)
        return found

    def _distributions(self, one: Encoded, progress) -> TopK | Unusable:
        ids, positions = one.input_ids.tolist(), one.predicted.tolist()
        try:
            answer = self._ask(self.protocol.body(self.served, ids, positions[0], self.top_k, 0.0))
        except NotAnswered as error:
            return Unusable("non_finite", f"refused by the server: {error}")
        finally:
            progress.update(1)
        try:
            return _top_k(self.protocol.answer(answer, ids, positions, self.top_k), self.top_k, self.vocab_size)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise RuntimeError(
                f"answer of a server: expected log-probabilities of {len(ids)} tokens, got something else "
                f"({type(error).__name__}: {first_line(error)}). Look at its version."
            ) from error

    def _ask(self, body: dict[str, Any]) -> Any:
        """The answer of whichever server is free; asked again where one fails.

        Raises: NotAnswered where the prompt is at fault.
        """
        refusals = 0
        while True:
            try:
                url = self._free.get(timeout=5.0)
            except queue.Empty:
                self._check_timeout("all servers failed")
                continue
            try:
                answer = self._request(url, self.protocol.path, body)
            except (httpx.TransportError, _Busy, NotAnswered) as error:
                refusals += isinstance(error, NotAnswered)
                if isinstance(error, NotAnswered) and refusals >= _REFUSALS and self._is_at_fault(url, body):
                    self._free.put(url)
                    raise
                self._back_off(url, error)
                self._check_timeout(first_line(error))
                continue
            except BaseException:
                self._free.put(url)
                raise
            self._answered, self._failures[url] = time.monotonic(), 0
            self._free.put(url)
            return answer

    def _is_at_fault(self, url: str, body: dict[str, Any]) -> bool:
        """Whether a server answers another prompt, and then refuses this one again."""
        refused = []
        for asked in (self.protocol.body(self.served, self._probe_ids, 1, self.top_k, 0.0), body):
            try:
                self._request(url, self.protocol.path, asked)
                refused.append(False)
            except NotAnswered:
                refused.append(True)
            except (httpx.TransportError, _Busy):
                return False
        self._answered = self._answered if refused[0] else time.monotonic()
        return refused == [False, True]

    def _request(self, url: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that a server answers to GET, or to POST of a body.

        Raises: _Busy where the server may answer later; NotAnswered where it refuses; InputError where it wants a key.
        """
        response = self._client.request("POST" if body else "GET", url + path, json=body)
        words = " ".join(response.text[:600].split())[:300]
        words = words.replace(self._key, "...") if self._key else words
        if response.status_code in (401, 403):
            got = "another" if self._key else "none"
            raise InputError(
                f"server {url}: expected an API key that it takes, got {got} (status {response.status_code}). Set the "
                f"environment variable {API_KEY}."
            )
        if response.status_code in _BUSY:
            raise _Busy(f"status {response.status_code}: {words}")
        if response.status_code != 200:
            raise NotAnswered(f"status {response.status_code} at {path}: {words}", response.status_code)
        try:
            return orjson.loads(response.content)
        except ValueError:
            try:
                return json.loads(response.content)  # with NaN and Infinity, which JSON does not know
            except ValueError as error:
                raise NotAnswered(f"no JSON at {path}: {words[:99]!r}") from error

    def _back_off(self, url: str, error: Exception) -> None:
        """Leave a server alone for a while, longer after each failure."""
        self._failures[url] += 1
        seconds = min(_BACK_OFF * 2 ** min(self._failures[url] // self.requests, 10), _MAX_BACK_OFF)
        if self._failures[url] == 1:
            logger.warning("server %s: %s; it is asked again.", url, first_line(error))
        timer = threading.Timer(seconds, self._free.put, [url])
        timer.daemon = True
        timer.start()

    def _check_timeout(self, reason: str) -> None:
        if time.monotonic() - self._answered > NO_ANSWER_TIMEOUT:
            raise RuntimeError(
                f"servers {', '.join(self.urls)}: no answer for {NO_ANSWER_TIMEOUT:.0f} s ({reason}). Start them "
                "and run the same command again: what is written is kept."
            )

    def _first_answer(self, url: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer of a server that is tried for the first time: asked again while it is busy."""
        pause = _BACK_OFF
        while True:
            try:
                answer = self._request(url, path, body)
            except _Busy as error:
                self._check_timeout(first_line(error))
                time.sleep(pause)
                pause = min(2 * pause, _MAX_BACK_OFF)
            else:
                self._answered = time.monotonic()
                return answer

    def _probe(self, url: str, tokenizer, model: str | None) -> tuple[Identity, int | None]:
        """(the served model, tokens of a prompt), after a short prompt whose log-probabilities must be the model's."""
        ids = self._probe_ids
        positions, advice = list(range(1, len(ids))), "Check the address and server_kind."
        try:
            self.served = self.protocol.info(partial(self._first_answer, url), url, model)
            bodies = (self.protocol.body(self.served, ids, 1, self.top_k, temperature) for temperature in (0.0, 2.0))
            contents = [self._first_answer(url, self.protocol.path, body) for body in bodies]
            answers = [self.protocol.answer(content, ids, positions, self.top_k) for content in contents]
            top, at_temperature_2 = (_top_k(answer, self.top_k, self.vocab_size) for answer in answers)
        except InputError:
            raise
        except (httpx.HTTPError, NotAnswered) as error:
            if getattr(error, "status", None) in (400, 413, 422):
                advice = self.protocol.advice(self.top_k)
            raise InputError(
                f"server {url}: expected one of kind {self.protocol.kind}, got: {first_line(error)}. {advice}"
            ) from error
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
        answered = [self.protocol.kind, self.served.name, self.served.version, ids, top.ids[:, 0].tolist()]
        return {"name": self.served.name, "fingerprint": short_digest(json.dumps(answered))}, self.served.max_length


def _top_k(answer: Answer, top_k: int, vocab_size: int) -> TopK:
    """An answer as arrays. What is no measurement (NaN, above 0, a stand-in for minus infinity) is not finite."""
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
    return TopK(ids.astype(np.int32), np.minimum(logprobs, 0), np.where(measured, np.maximum(-logp, 0), np.nan))


def _is_url(text: str) -> bool:
    try:
        return bool(httpx.URL(text).host) and text.startswith(("http://", "https://"))
    except httpx.InvalidURL:
        return False


def _api_key() -> str:
    """The API key from the environment, which no message quotes; empty: none."""
    key = os.environ.get(API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{API_KEY}: expected printable ASCII characters, got others. Set it to the server's key.")
    return key
