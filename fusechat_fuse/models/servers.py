"""Inference servers of one model, vLLM or SGLang: requests to whichever is free, and what they say of the model.

Several servers share the work, each with many requests in flight. A server that does not answer is asked again later,
less and less often, while the others do its work. A prompt is at fault where a server refuses it again and again, and
answers another one.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import httpx
import orjson

from fusechat_fuse.errors import InputError, check_integer, first_line

logger = logging.getLogger(__name__)
API_KEY = "FUSECHAT_SERVER_API_KEY"  # environment variable
NO_ANSWER_TIMEOUT = 300.0  # seconds without an answer from any server
_BACK_OFF, _MAX_BACK_OFF = 0.5, 30.0  # seconds between two attempts on one server
_BUSY = (408, 425, 429, 502, 503, 504)  # statuses of a server that may answer later
_REFUSALS = 3  # of one prompt, before the server is tried with another
PATHS = {"vllm": "/v1/completions", "sglang": "/generate"}  # kind of server -> where it takes prompts of ids
Get = Callable[[str], Any]  # path -> the JSON there; raises NotAnswered where there is none
Item = TypeVar("Item")
Found = TypeVar("Found")


class _Busy(Exception):
    """A server that may answer later."""


class NotAnswered(Exception):
    """An answer that is an error of some status, or no JSON."""

    def __init__(self, text: str, status: int = 200):
        super().__init__(text)
        self.status = status


class ServerInfo(NamedTuple):
    """Name and version of the served model; max_length: tokens of a prompt, None where the server does not tell;
    adapter: whether the model is a LoRA adapter above the server's own; beside_adapters: whether there are any."""

    name: str
    version: str
    max_length: int | None
    adapter: bool
    beside_adapters: bool


def _optional(get: Get, path: str) -> dict[str, Any]:
    """What is at a path that some versions and routers do not have."""
    try:
        found = get(path)
    except NotAnswered:
        return {}
    return found if isinstance(found, dict) else {}


def _card(get: Get, url: str, model: str | None) -> dict[str, Any]:
    """What the server says about the model of this name, or about the only one; `max_model_len` is the base's.

    Raises: InputError with the names of those that it serves.
    """
    cards = get("/v1/models")["data"]
    by_name = {str(card["id"]): card for card in cards}
    if model is None and len(by_name) == 1:
        (model,) = by_name
    if model not in by_name:
        raise InputError(
            f"server_model for {url}: expected the name of one of the served models ({', '.join(by_name)}), got "
            f"{model or 'none'}. Choose one."
        )
    longest = next((card["max_model_len"] for card in [by_name[model], *cards] if card.get("max_model_len")), None)
    return {**by_name[model], "max_model_len": longest, "beside_adapters": any(card.get("parent") for card in cards)}


def _info(kind: str, get: Get, url: str, model: str | None) -> ServerInfo:
    """What a server says about a model, by its name; None: the only one."""
    card = _card(get, url, model)
    longest = card["max_model_len"]
    if kind == "vllm":
        version = str(_optional(get, "/version").get("version", ""))
        longest = longest and longest - 1  # one token is generated
        return ServerInfo(str(card["id"]), version, longest, False, card["beside_adapters"])
    server = _optional(get, "/get_server_info")
    longest = server.get("max_req_input_len") or server.get("context_length") or longest
    version, adapter = str(server.get("version", "")), bool(card.get("parent"))
    return ServerInfo(str(card["id"]), version, longest, adapter, card["beside_adapters"])


def urls_of(command: str, server: str | list[str], kind: str, requests: int) -> list[str]:
    """The URLs of the servers. Raises: InputError where the values are none that `Servers` takes."""
    if kind not in PATHS:
        raise InputError(f"server_kind for {command}: expected one of {', '.join(PATHS)}, got {kind!r}.")
    urls = [url.rstrip("/") for url in (server.split(",") if isinstance(server, str) else server) if url]
    if not urls or not all(map(_is_url, urls)):
        raise InputError(f"server for {command}: expected URLs such as http://localhost:8000, got {server!r}.")
    check_integer(f"server_requests for {command}", requests)
    return urls


class Servers:
    """Servers of one model.

    Args:
        command: for messages. server: URLs, a list or separated by commas. kind: vllm or sglang.
        model: the name to ask for; None: the servers serve one only. requests: in flight at each server.
    Attributes: served: the model, as the first server tells. max_length: tokens of a prompt, None where none tells.
    Raises: InputError where the values are none of these, or a server is not of this kind.
    """

    def __init__(self, command: str, server: str | list[str], *, kind: str, model: str | None, requests: int):
        urls = urls_of(command, server, kind, requests)
        self.kind, self.path, self.urls, self.requests = kind, PATHS[kind], urls, requests
        self._free: queue.Queue[str] = queue.Queue()
        self._failures: dict[str, int] = dict.fromkeys(urls, 0)
        self._answered = time.monotonic()
        self._key, limits = _api_key(), httpx.Limits(max_connections=requests * len(urls))
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(timeout=httpx.Timeout(600.0, connect=10.0), limits=limits, headers=headers)
        self._infos = [self._tried(url, lambda url=url: self._info_of(url, model)) for url in urls]
        self.served = self._infos[0]
        self.max_length = min(filter(None, (info.max_length for info in self._infos)), default=None)
        for url in urls * requests:
            self._free.put(url)

    def probe(self, probe: Callable[[str], Found]) -> Found:
        """What `probe` finds at each URL. Raises: InputError where servers differ in it, or in name or version."""
        found = [(info[:2], probe(url)) for url, info in zip(self.urls, self._infos)]
        for url, info, one in zip(self.urls, self._infos, found):
            if one != found[0]:
                raise InputError(
                    f"server {url}: expected the model of {self.urls[0]} ({self.served.name}), got another answer "
                    f"({info.name}). Serve one model of one version."
                )
        return found[0][1]

    def try_out(self, url: str, body: dict[str, Any], advice: str) -> Any:
        """The answer of one server. Raises: InputError, with the advice where the server refuses the request."""
        return self._tried(url, lambda: self._first_answer(url, self.path, body), advice)

    def map(self, function: Callable[[Item], Found], items: list[Item]) -> list[Found]:
        """The function of each item, in order, as many at once as requests may be in flight."""
        with ThreadPoolExecutor(self.requests * len(self.urls)) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def ask(self, body: dict[str, Any], other: dict[str, Any]) -> Any:
        """The answer of whichever server is free; asked again where one fails.

        Args: body: of the request. other: of a request that a server answers if it can.
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
                answer = self._request(url, self.path, body)
            except (httpx.TransportError, _Busy, NotAnswered) as error:
                refusals += isinstance(error, NotAnswered)
                if isinstance(error, NotAnswered) and refusals >= _REFUSALS and self._is_at_fault(url, body, other):
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

    def _is_at_fault(self, url: str, body: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether a server answers another prompt, and then refuses this one again."""
        refused = []
        for asked in (other, body):
            try:
                self._request(url, self.path, asked)
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
            found = orjson.loads(response.content)
        except ValueError:
            try:
                found = json.loads(response.content)  # with NaN and Infinity, which JSON does not know
            except ValueError as error:
                raise NotAnswered(f"no JSON at {path}: {words[:99]!r}") from error
        if _is_aborted(found):
            raise NotAnswered(f"an answer that the server broke off (finish_reason abort) at {path}: {words[:99]!r}")
        return found

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

    def _info_of(self, url: str, model: str | None) -> ServerInfo:
        try:
            return _info(self.kind, partial(self._first_answer, url), url, model)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise NotAnswered("no list of models at /v1/models") from error

    def _tried(self, url: str, ask: Callable[[], Found], advice_if_refused: str = "") -> Found:
        """What is asked of a server, whose errors say that it is none of this kind."""
        advice = "Check the address and server_kind."
        try:
            return ask()
        except (httpx.HTTPError, NotAnswered) as error:
            if getattr(error, "status", None) in (400, 413, 422):
                advice = advice_if_refused or advice
            raise InputError(
                f"server {url}: expected one of kind {self.kind}, got: {first_line(error)}. {advice}"
            ) from error


def _is_aborted(content: Any) -> bool:
    """Whether a server broke its answer off, with status 200: it is shut down, full, or cannot take the prompt."""
    choices = content.get("choices") if isinstance(content, dict) else None
    about = choices[0] if isinstance(choices, list) and choices else getattr(content, "get", {}.get)("meta_info")
    reason = about.get("finish_reason") if isinstance(about, dict) else None
    return (reason.get("type") if isinstance(reason, dict) else reason) == "abort"


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
