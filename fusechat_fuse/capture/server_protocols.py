"""Requests to vLLM and SGLang for log-probabilities of a prompt, and how their answers are read.

vLLM's `/v1/completions` takes a prompt of ids and with `prompt_logprobs: k` gives, for every token of it but the first,
the k most likely tokens and the token itself. SGLang's `/generate` gives the same from `logprob_start_len` on, whose
first entry is empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fusechat_fuse.models.servers import ServerInfo


class Answer(NamedTuple):
    """Of each requested position: ids and log-probabilities [P, K], most likely first; the actual token's
    log-probability [P], and its text [P] where the server gives it."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    actual: list[float]
    texts: list[str | None]


class Vllm:
    """vLLM's completions. `Sglang` has the same methods."""

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
