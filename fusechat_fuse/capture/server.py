"""Log-probabilities of prompts from inference servers, vLLM or SGLang, in place of a model in this process.

Prompts go as the ids that our own encoder made, so positions are exact; the cross-entropy is exact because both servers
give the log-probability of the prompt's own token beside the k most likely ones. Several servers of one model share the
work, each with many requests in flight. A server that does not answer is asked again later, less and less often, while
the others do its work.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import orjson

from fusechat_fuse.capture.batches import TopK
from fusechat_fuse.capture.server_protocols import PROTOCOLS, Answer
from fusechat_fuse.errors import InputError, check_integer, first_line
from fusechat_fuse.models.identity import Identity
from fusechat_fuse.store.files import short_digest
from fusechat_fuse.text.chat import Encoded

logger = logging.getLogger(__name__)
NO_ANSWER_TIMEOUT = 300.0  # seconds without an answer from any server
_MAX_BACK_OFF = 30.0  # seconds between two attempts on one server
_PROBE_TEXT = "The three words"
_TOLERANCE = 1e-2  # log-probabilities of one prompt differ by so much between batches


def connect(server: str | list[str], kind: str, tokenizer, top_k: int, requests: int, vocab_size: int) -> ServerRunner:
    """The servers, each tried with a short prompt.

    Args:
        server: URLs, a list or separated by commas. The others: as `ServerRunner` takes them.
    """
    urls = [url for url in (server.split(",") if isinstance(server, str) else server) if url]
    if not urls or not all(map(_is_url, urls)):
        raise InputError(f"server for represent: expected URLs such as http://localhost:8000, got {server!r}.")
    check_integer("server_requests for represent", requests)
    return ServerRunner(urls, kind, tokenizer, top_k=top_k, requests=requests, vocab_size=vocab_size)


def _is_url(text: str) -> bool:
    try:
        return bool(httpx.URL(text).host) and text.startswith(("http://", "https://"))
    except httpx.InvalidURL:
        return False


class ServerRunner:
    """Distributions of conversations from servers of one model.

    Args:
        urls: of the servers. kind: vllm or sglang. tokenizer: the model's own.
        top_k: entries per predicted token. requests: in flight at each server. vocab_size: ids are below it.
    Attributes: identity: the model as it is served. max_length: tokens of a prompt, None where the servers do not say.
    Raises: InputError where a server is not of this kind, gives no log-probabilities of prompts, alters them, has
        another tokenizer, or serves another model than the first.
    """

    def __init__(self, urls: list[str], kind: str, tokenizer, *, top_k: int, requests: int, vocab_size: int):
        if kind not in PROTOCOLS:
            raise InputError(f"server_kind for represent: expected one of {', '.join(PROTOCOLS)}, got {kind!r}.")
        self.protocol, self.top_k, self.vocab_size = PROTOCOLS[kind], top_k, vocab_size
        self.requests, self.urls, self.padded = requests, [url.rstrip("/") for url in urls], 0
        self._free: queue.Queue[str] = queue.Queue()
        self._failures: dict[str, int] = dict.fromkeys(self.urls, 0)
        self._answered = time.monotonic()
        limits = httpx.Limits(max_connections=requests * len(urls))
        self._client = httpx.Client(timeout=httpx.Timeout(600.0, connect=10.0), limits=limits)
        identities, lengths = zip(*(self._probe(url, tokenizer) for url in self.urls))
        self.identity: Identity = identities[0]
        self.max_length: int | None = min(filter(None, lengths), default=None)
        for url, identity in zip(self.urls, identities):
            if identity != self.identity:
                raise InputError(
                    f"server {url}: expected the model of {self.urls[0]} ({self.identity['name']}), got another answer "
                    f"({identity['name']}). Serve one model of one version."
                )
        for url in self.urls * requests:
            self._free.put(url)

    def __call__(self, encoded: list[Encoded], progress) -> list[TopK]:
        """A TopK for each conversation, in order."""
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

    def _distributions(self, one: Encoded, progress) -> TopK:
        ids, first = one.input_ids.tolist(), int(one.predicted[0])
        answer = self._ask(self.protocol.body(self.identity["name"], ids, first, self.top_k, 0.0))
        try:
            found = _top_k(self.protocol.answer(answer, ids, one.predicted.tolist(), self.top_k))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RuntimeError(
                f"answer of a server: expected log-probabilities of {len(ids)} tokens, got something else "
                f"({type(error).__name__}: {first_line(error)}). Look at its version."
            ) from error
        progress.update(1)
        return found

    def _ask(self, body: dict[str, Any]) -> Any:
        """The answer of whichever server is free; asked again where one fails."""
        while True:
            try:
                url = self._free.get(timeout=5.0)
            except queue.Empty:
                self._check_timeout("all servers failed")
                continue
            try:
                answer = self._post(url, body)
            except (httpx.TransportError, _Unavailable) as error:
                self._back_off(url, error)
                self._check_timeout(first_line(error))
                continue
            except BaseException:
                self._free.put(url)
                raise
            self._answered, self._failures[url] = time.monotonic(), 0
            self._free.put(url)
            return answer

    def _post(self, url: str, body: dict[str, Any]) -> Any:
        response = self._client.post(url + self.protocol.path, json=body)
        if response.status_code == 429 or response.status_code >= 500:
            raise _Unavailable(f"status {response.status_code}: {response.text[:200]}")
        if response.status_code != 200:
            raise InputError(
                f"server {url}: expected an answer, got status {response.status_code}: "
                f"{' '.join(response.text.split())[:300]} {self.protocol.advice(self.top_k)}"
            )
        try:
            return orjson.loads(response.content)
        except ValueError as error:
            raise InputError(
                f"server {url}: expected JSON from {self.protocol.path}, got {response.text[:99]!r}. Check the address."
            ) from error

    def _back_off(self, url: str, error: Exception) -> None:
        """Leave a server alone for a while, longer after each failure."""
        self._failures[url] += 1
        seconds = min(0.5 * 2 ** min(self._failures[url] // self.requests, 10), _MAX_BACK_OFF)
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

    def _probe(self, url: str, tokenizer) -> tuple[Identity, int | None]:
        """(the served model, tokens of a prompt), after a short prompt whose log-probabilities must be the model's."""
        ids = tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"]
        positions = list(range(1, len(ids)))
        try:
            info = self.protocol.info(self._client, url)
            bodies = (self.protocol.body(info.name, ids, 1, self.top_k, temperature) for temperature in (0.0, 2.0))
            answers = [self.protocol.answer(self._post(url, body), ids, positions, self.top_k) for body in bodies]
        except InputError:
            raise
        except (httpx.HTTPError, _Unavailable, ValueError) as error:
            raise InputError(
                f"server {url}: expected one of kind {self.protocol.kind}, got: {first_line(error)}. Check the address."
            ) from error
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"server {url}: expected log-probabilities of the prompt, got an answer without them (llama.cpp's "
                "server gives none: take --gguf_file). Serve the model with vLLM or SGLang."
            ) from error
        self._check_texts(url, ids, answers[0], tokenizer)
        top, at_temperature_2 = map(_top_k, answers)
        mass = np.exp(top.logprobs.astype(np.float64)).sum(1)
        altered = np.abs(top.ce - at_temperature_2.ce).max() > _TOLERANCE or mass.max() > 1 + _TOLERANCE
        if altered or not top.finite.all():
            raise InputError(
                f"server {url}: expected the model's own log-probabilities, got some that temperature or a logits "
                "processor alters. Serve it with raw log-probabilities and without processors."
            )
        answered = [self.protocol.kind, info.name, info.version, ids, top.ids[:, 0].tolist()]
        return {"name": info.name, "fingerprint": short_digest(json.dumps(answered))}, info.max_length

    def _check_texts(self, url: str, ids: list[int], answer: Answer, tokenizer) -> None:
        """The server's tokens must be the tokenizer's."""
        for position, text in zip(range(1, len(ids)), answer.texts):
            own = tokenizer.decode([ids[position]])
            if text is not None and text.strip() != own.strip():
                raise InputError(
                    f"server {url}: expected the given model's tokenizer, got one where token {ids[position]} is "
                    f"{text!r} and not {own!r}. Give --model_name_or_path of the model that is served."
                )


class _Unavailable(Exception):
    """A server that may answer later."""


def _top_k(answer: Answer) -> TopK:
    ce = np.maximum(-np.array(answer.actual, np.float32), 0)
    logprobs = np.minimum(np.array(answer.logprobs, np.float32), 0)
    return TopK(np.array(answer.ids, np.int32), logprobs, ce, np.isfinite(ce) & np.isfinite(logprobs).all(1))
