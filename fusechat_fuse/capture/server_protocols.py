"""Requests to vLLM and SGLang for log-probabilities of a prompt, and how their answers are read.

vLLM's `/v1/completions` takes a prompt of ids and with `prompt_logprobs: k` gives, for every token of it but the first,
the k most likely tokens and the token itself. SGLang's `/generate` gives the same from `logprob_start_len` on, whose
first entry is empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import httpx


class ServerInfo(NamedTuple):
    """Name and version of the served model; max_length: tokens of a prompt, None where the server does not tell."""

    name: str
    version: str
    max_length: int | None


class Answer(NamedTuple):
    """Of each requested position: ids and log-probabilities [P, K], most likely first; the actual token's
    log-probability [P], and its text [P] where the server gives it."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    actual: list[float]
    texts: list[str | None]


def _json(client: httpx.Client, url: str) -> Any:
    return client.get(url).raise_for_status().json()


class Vllm:
    """vLLM's completions. `Sglang` has the same methods."""

    kind, path = "vllm", "/v1/completions"

    def info(self, client: httpx.Client, url: str) -> ServerInfo:
        """What the server says about itself."""
        (served, *_) = _json(client, f"{url}/v1/models")["data"]
        longest = served.get("max_model_len")
        version = str(_json(client, f"{url}/version")["version"])
        return ServerInfo(str(served["id"]), version, longest and longest - 1)  # one token is generated

    def body(self, name: str, ids: list[int], first: int, top_k: int, temperature: float) -> dict[str, Any]:
        """A request for the log-probabilities of a prompt's tokens from index `first` on."""
        options = {"prompt_logprobs": top_k, "max_tokens": 1, "temperature": temperature, "add_special_tokens": False}
        return {"model": name, "prompt": ids, **options}

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

    def info(self, client: httpx.Client, url: str) -> ServerInfo:
        name = _json(client, f"{url}/get_model_info")["model_path"]
        server = _json(client, f"{url}/get_server_info")
        longest = server.get("max_req_input_len") or server.get("context_length")
        return ServerInfo(str(name), str(server["version"]), longest)

    def body(self, name: str, ids: list[int], first: int, top_k: int, temperature: float) -> dict[str, Any]:
        return {
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
