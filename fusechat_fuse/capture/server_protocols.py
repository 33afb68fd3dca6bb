"""Requests to vLLM and SGLang for log-probabilities of a prompt, and how their answers are read.

vLLM's `/v1/completions` takes a prompt of ids and with `prompt_logprobs: k` gives, for every token of it but the first,
the k most likely tokens and the token itself. SGLang's `/generate` gives the same from `logprob_start_len` on, whose
first entry is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fusechat_fuse.errors import InputError

Get = Callable[[str], Any]  # path -> the JSON there; raises NotAnswered where there is none


class NotAnswered(Exception):
    """An answer that is an error of some status, or no JSON."""

    def __init__(self, text: str, status: int = 200):
        super().__init__(text)
        self.status = status


class ServerInfo(NamedTuple):
    """Name and version of the served model; max_length: tokens of a prompt, None where the server does not tell;
    adapter: whether the model is a LoRA adapter above the server's own."""

    name: str
    version: str
    max_length: int | None
    adapter: bool


class Answer(NamedTuple):
    """Of each requested position: ids and log-probabilities [P, K], most likely first; the actual token's
    log-probability [P], and its text [P] where the server gives it."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    actual: list[float]
    texts: list[str | None]


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
    return {**by_name[model], "max_model_len": longest}


class Vllm:
    """vLLM's completions. `Sglang` has the same methods."""

    kind, path = "vllm", "/v1/completions"

    def info(self, get: Get, url: str, model: str | None) -> ServerInfo:
        """What the server says about a model, by its name; None: the only one."""
        card = _card(get, url, model)
        longest = card["max_model_len"]
        version = str(_optional(get, "/version").get("version", ""))
        return ServerInfo(str(card["id"]), version, longest and longest - 1, False)  # one token is generated

    def body(self, served: ServerInfo, ids: list[int], first: int, top_k: int, temperature: float) -> dict[str, Any]:
        """A request for the log-probabilities of a prompt's tokens from index `first` on."""
        options = {"prompt_logprobs": top_k, "max_tokens": 1, "temperature": temperature, "add_special_tokens": False}
        return {"model": served.name, "prompt": ids, **options}

    def answer(self, content: Any, ids: list[int], positions: list[int], top_k: int) -> Answer:
        """The log-probabilities at `positions`; KeyError, TypeError, ValueError or IndexError where there are none."""
        entries = content["choices"][0]["prompt_logprobs"]
        if len(entries) != len(ids):
            raise ValueError(f"{len(entries)} entries for {len(ids)} tokens")
        found = Answer([], [], [], [])
        for position in positions:
            entry = entries[position]
            actual = entry[str(ids[position])]
            best = sorted((one["rank"], int(token), one["logprob"]) for token, one in entry.items())[:top_k]
            found.ids.append([token for _, token, _ in best])
            found.logprobs.append([logprob for _, _, logprob in best])
            found.actual.append(actual["logprob"])
            found.texts.append(actual.get("decoded_token"))
        return found

    def advice(self, top_k: int) -> str:
        """What to do about a request that a server refuses."""
        return f"vLLM must be started with --max-logprobs {top_k} or more, and a --max-model-len above the prompt's."


class Sglang:
    """SGLang's own interface."""

    kind, path = "sglang", "/generate"

    def info(self, get: Get, url: str, model: str | None) -> ServerInfo:
        card, server = _card(get, url, model), _optional(get, "/get_server_info")
        longest = server.get("max_req_input_len") or server.get("context_length") or card["max_model_len"]
        return ServerInfo(str(card["id"]), str(server.get("version", "")), longest, bool(card.get("parent")))

    def body(self, served: ServerInfo, ids: list[int], first: int, top_k: int, temperature: float) -> dict[str, Any]:
        return {
            **({"lora_path": served.name} if served.adapter else {}),
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": temperature},
            "return_logprob": True,
            "logprob_start_len": first - 1,
            "top_logprobs_num": top_k,
            "return_text_in_logprobs": first == 1,  # the probe: texts cost time
        }

    def answer(self, content: Any, ids: list[int], positions: list[int], top_k: int) -> Answer:
        meta, start = content["meta_info"], positions[0] - 1
        own, best = meta["input_token_logprobs"], meta["input_top_logprobs"]
        sent, received = ids[start:], [entry[1] for entry in own]
        same = len(sent) == len(received) == len(best) and all(a in (b, 0) for a, b in zip(received, sent))
        if not same:  # SGLang reports the vocabulary's last id as 0
            raise ValueError("entries of other tokens than were sent")
        found = Answer([], [], [], [])
        for position in positions:
            entries = best[position - start][:top_k]
            found.ids.append([entry[1] for entry in entries])
            found.logprobs.append([entry[0] for entry in entries])
            logprob, _, text = own[position - start]
            found.actual.append(logprob)
            found.texts.append(text)
        return found

    def advice(self, top_k: int) -> str:
        return "SGLang must take prompts of this length (--context-length)."


PROTOCOLS = {"vllm": Vllm(), "sglang": Sglang()}
