"""Answers from inference servers, vLLM or SGLang, in place of a model in this process.

Prompts go as the ids that the model's own chat template makes, all conversations of a batch at once. A prompt that a
server refuses again and again, while it answers another, has an empty, unfinished answer, and is counted.
"""

from __future__ import annotations

from typing import Any

from fusechat_fuse.errors import InputError, first_line
from fusechat_fuse.evaluation.generation import Answer, Prompt, Prompter, TurnEnds
from fusechat_fuse.models.servers import NotAnswered, Servers

_PROBE = [{"role": "user", "content": "Say three words."}]
_PROBE_TOKENS = 8


class ServedGenerator(Prompter):
    """Generates answers with servers of one model, each tried with a short prompt.

    Args:
        servers: of one model. tokenizer, max_new_tokens, ends, positions: as `Prompter` takes them; where the servers
            tell how many tokens they take, that holds for positions.
    Attributes: refused: prompts that the servers refused.
    Raises: InputError where a server gives no text, or has another tokenizer.
    """

    def __init__(self, servers: Servers, tokenizer, max_new_tokens: int, ends: TurnEnds, positions: int | None):
        positions = servers.max_length + 1 if servers.max_length else positions
        super().__init__(tokenizer, max_new_tokens, ends, positions)
        self.servers = servers
        self.refused: list[str] = []
        self._probe_ids = self.prompts([_PROBE])[0].ids
        servers.probe(self._probe)

    def generate(self, conversations: list[list[dict[str, str]]], temperature: float) -> list[Answer]:
        """One answer per conversation, of as many tokens as its own prompt leaves positions for."""
        import torch

        prompts = self.prompts(conversations)
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        return self.servers.map(lambda one: self._answer(*one, temperature), list(zip(prompts, seeds)))

    def _answer(self, prompt: Prompt, seed: int, temperature: float) -> Answer:
        if (room := self.room(prompt.ids)) <= 0:
            return Answer("", False, prompt.problem)
        try:
            content = self.servers.ask(self._body(prompt.ids, room, temperature, seed), self._body(self._probe_ids, 1))
            text, finished, ids = self._read(content)
        except NotAnswered as error:
            self.refused.append(str(error))
            return Answer("", False)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise RuntimeError(
                f"answer of a server: expected text and finish_reason, got something else ({type(error).__name__}: "
                f"{first_line(error)}). Look at its version."
            ) from error
        return self.reopened(self.read(ids, finished) if ids else Answer(text, finished), prompt.text)

    def _body(self, prompt: list[int], room: int, temperature: float = 0.0, seed: int = 0) -> dict[str, Any]:
        """A request for a continuation of `prompt` by at most `room` tokens.

        A server takes what it is not given from the model's generation settings, so each of these is given.
        """
        served = self.servers.served
        options = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        options |= {"skip_special_tokens": True, "stop_token_ids": self.ends, "stop": self.stops or []}
        if self.servers.kind == "vllm":
            more = {"seed": seed, "add_special_tokens": False, "return_token_ids": True}
            more["include_stop_str_in_output"] = True
            return {"model": served.name, "prompt": prompt, "max_tokens": room, **options, **more}
        options["no_stop_trim"] = True
        adapter = {"lora_path": served.name} if served.adapter else {}
        return {**adapter, "input_ids": prompt, "sampling_params": {"max_new_tokens": room, **options}}

    def _read(self, content: Any) -> tuple[str, bool, list[int] | None]:
        """The text, whether the turn ended, and the ids where the server gives them."""
        if self.servers.kind == "vllm":
            content = content["choices"][0]
            ids, reason = content.get("token_ids"), content["finish_reason"]
        else:
            ids, reason = content.get("output_ids"), content["meta_info"]["finish_reason"]["type"]
        return content["text"].strip(), reason == "stop", ids

    def _probe(self, url: str) -> None:
        """Raise InputError unless a server continues a short prompt, in the model's own tokens."""
        content = self.servers.try_out(url, self._body(self._probe_ids, _PROBE_TOKENS), "")
        try:
            text, _, ids = self._read(content)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(
                f"server {url}: expected text and finish_reason, got an answer without them. Check server_kind."
            ) from error
        own = self.tokenizer.decode(ids or [], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        if ids and not own.startswith(text.rstrip("\ufffd")):
            raise InputError(
                f"server {url}: expected the given model's tokenizer, got one where tokens {ids} are {text!r} "
                f"and not {own!r}. Give --model of the model that is served."
            )
