"""An inference server in the model's place: log-probabilities of prompts from vLLM or SGLang.

Prompts go as the ids that our own encoder made, so positions are exact; the cross-entropy is exact because both servers
give the log-probability of the prompt's own token beside the k most likely ones. Several servers of one model share the
work, each with many requests in flight. One that does not answer is asked again after a while, and less and less often;
the others do its work meanwhile.
"""

from __future__ import annotations

import hashlib
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
from fusechat_fuse.text.chat import Encoded

logger = logging.getLogger(__name__)
PATIENCE = 300.0  # seconds without an answer of any server
_LONGEST_REST = 30.0  # seconds between two attempts on one server
_PROBE = "The three words"
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
    Raises: InputError where a server is not of this kind, gives no log-probabilities of prompts, bends them, has
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
        found = [self._look_at(url, tokenizer) for url in self.urls]
        self.identity: Identity = found[0]["identity"]
        self.max_length: int | None = min((one["max_length"] for one in found if one["max_length"]), default=None)
        for url, one in zip(self.urls, found):
            if one["identity"] != self.identity:
                raise InputError(
                    f"server {url}: expected the model of {self.urls[0]} ({self.identity['name']}), got another answer "
                    f"({one['identity']['name']}). Serve one model of one version."
                )
        for url in self.urls * requests:
            self._free.put(url)

    def __call__(self, encoded: list[Encoded], progress) -> list[TopK]:
        """A TopK for each conversation, in order."""
        begun = time.monotonic()
        with ThreadPoolExecutor(self.requests * len(self.urls)) as pool:
            futures = [pool.submit(self._of, one, progress) for one in encoded]
            try:
                found = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        tokens = sum(len(one.input_ids) for one in encoded)
        self.padded += tokens
        progress.set_postfix_str(f"{tokens / max(time.monotonic() - begun, 1e-9):,.0f} tokens/s", refresh=False)
        return found

    def _of(self, one: Encoded, progress) -> TopK:
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
        """An answer, of whichever server is free; again where one fails."""
        while True:
            try:
                url = self._free.get(timeout=5.0)
            except queue.Empty:
                self._check_patience("all rest")
                continue
            try:
                answer = self._post(url, body)
            except (httpx.TransportError, _Busy) as error:
                self._rest(url, error)
                self._check_patience(first_line(error))
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
            raise _Busy(f"status {response.status_code}: {response.text[:200]}")
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

    def _rest(self, url: str, error: Exception) -> None:
        """Give a server's place back after a while, longer after each failure."""
        self._failures[url] += 1
        rest = min(0.5 * 2 ** min(self._failures[url] // self.requests, 10), _LONGEST_REST)
        if self._failures[url] == 1:
            logger.warning("server %s: %s; it is asked again.", url, first_line(error))
        timer = threading.Timer(rest, self._free.put, [url])
        timer.daemon = True
        timer.start()

    def _check_patience(self, told: str) -> None:
        if time.monotonic() - self._answered > PATIENCE:
            raise RuntimeError(
                f"servers {', '.join(self.urls)}: no answer for {PATIENCE:.0f} s ({told}). Start them and give the "
                "same command again: what is written is kept."
            )

    def _look_at(self, url: str, tokenizer) -> dict[str, Any]:
        """What a server serves, after a prompt of a few tokens has shown that it can be relied on."""
        ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        positions = list(range(1, len(ids)))
        try:
            about = self.protocol.about(self._client, url)
            bodies = [self.protocol.body(about.name, ids, 1, self.top_k, heat) for heat in (0.0, 2.0)]
            plain, heated = (self.protocol.answer(self._post(url, body), ids, positions, self.top_k) for body in bodies)
        except InputError:
            raise
        except (httpx.HTTPError, _Busy, ValueError) as error:
            raise InputError(
                f"server {url}: expected one of kind {self.protocol.kind}, got: {first_line(error)}. Check the address."
            ) from error
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"server {url}: expected log-probabilities of the prompt, got an answer without them (llama.cpp's "
                "server gives none: take --gguf_file). Serve the model with vLLM or SGLang."
            ) from error
        self._check_texts(url, ids, plain, tokenizer)
        top, heated_top = _top_k(plain), _top_k(heated)
        mass = np.exp(top.logprobs.astype(np.float64)).sum(1)
        if np.abs(top.ce - heated_top.ce).max() > _TOLERANCE or mass.max() > 1 + _TOLERANCE or not top.finite.all():
            raise InputError(
                f"server {url}: expected log-probabilities as the model has them, got some that temperature or a "
                "processor bends. Serve it with raw log-probabilities and without processors."
            )
        answered = [self.protocol.kind, about.name, about.version, ids, top.ids[:, 0].tolist()]
        fingerprint = hashlib.sha256(json.dumps(answered).encode()).hexdigest()[:16]
        return {"identity": {"name": about.name, "fingerprint": fingerprint}, "max_length": about.max_length}

    def _check_texts(self, url: str, ids: list[int], answer: Answer, tokenizer) -> None:
        """The server's tokens must be the tokenizer's."""
        for position, text in zip(range(1, len(ids)), answer.texts):
            own = tokenizer.decode([ids[position]])
            if text is not None and text.strip() != own.strip():
                raise InputError(
                    f"server {url}: expected the given model's tokenizer, got one where token {ids[position]} is "
                    f"{text!r} and not {own!r}. Give --model_name_or_path of the model that is served."
                )


class _Busy(Exception):
    """A server that may answer later."""


def _top_k(answer: Answer) -> TopK:
    ce = np.maximum(-np.array(answer.actual, np.float32), 0)
    logprobs = np.minimum(np.array(answer.logprobs, np.float32), 0)
    return TopK(np.array(answer.ids, np.int32), logprobs, ce, np.isfinite(ce) & np.isfinite(logprobs).all(1))
