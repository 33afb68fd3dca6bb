"""A model with its chat template: conversations in, answers out, in batches that are padded on the left."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fusechat_fuse.models.files import adapter_base, is_named, load_config, model_file, positions_of
from fusechat_fuse.store.files import read_json
from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.templates import (
    REASONING_MARKS,
    added_texts,
    any_of,
    check_contents,
    control_texts,
    native_template,
    special_texts,
)

_OPENED = re.compile(f"(?:{'|'.join(sorted(m for m in REASONING_MARKS if '/' not in m))})\\s*$")
_PLACEHOLDER = "QZ1ZQ"  # stands for the answer in a rendered prompt


@dataclass(frozen=True)
class Answer:
    """A generated text, and whether the model ended its turn within the tokens it had.

    Attributes:
        problem: refused (the model's chat template takes no such conversation) or special_token (the prompt holds the
            text of one, or one stood within the answer, and the text lacks it); else None.
    """

    text: str
    finished: bool
    problem: str | None = None


class TurnEnds(NamedTuple):
    """What ends a turn by a model's generation settings; no other of its settings counts."""

    eos_token_id: int | list[int] | None
    stop_strings: list[str] | None


def turn_ends(model, *, trust_remote_code: bool = False) -> TurnEnds:
    """What ends a model's turns: of its generation settings (of the base below adapters), else of its configuration."""
    if not is_named(model):
        settings: Any = model.generation_config.to_dict()
    elif file := model_file(adapter_base(model) or model, "generation_config.json"):
        settings = read_json(file, "generation settings")
    else:
        settings = load_config(model, trust_remote_code=trust_remote_code).get_text_config().to_dict()
    stops = settings.get("stop_strings")
    return TurnEnds(settings.get("eos_token_id"), [stops] if isinstance(stops, str) else stops)


class Prompt(NamedTuple):
    """What a model continues; nothing, and the problem, where there is no such prompt."""

    text: str
    ids: list[int]
    problem: str | None = None


class Prompter:
    """A model's prompts, and what ends its turns.

    Args:
        tokenizer: its fast tokenizer. max_new_tokens: per answer; fewer where the model's positions run out.
        ends: of its generation settings. positions: of the model, None where it does not say.
    """

    def __init__(self, tokenizer, max_new_tokens: int, ends: TurnEnds, positions: int | None):
        self.tokenizer, self.max_new_tokens, self.positions = tokenizer, max_new_tokens, positions
        self.template, self.stops = native_template(tokenizer), ends.stop_strings
        self._reserved = any_of(control_texts(tokenizer, self.template))
        eos = ends.eos_token_id
        found = {eos} if isinstance(eos, int) else set(eos or ())
        found |= {tokenizer.eos_token_id, added_texts(tokenizer).get(self.template.end_of_turn)} - {None}
        self.ends = sorted(found)
        self.special = set(special_texts(tokenizer).values())

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The text up to where the answer begins.

        Raises: Unusable where the template refuses the messages, or one holds the text of a special token, as in
            `ConversationEncoder`.
        """
        check_contents(messages, self._reserved)
        if self.tokenizer.chat_template:
            return self.template.render(messages, generation_prompt=True)
        whole = self.template.render([*messages, {"role": "assistant", "content": _PLACEHOLDER}])
        return whole.partition(_PLACEHOLDER)[0]

    def prompts(self, conversations: list[list[dict[str, str]]]) -> list[Prompt]:
        """The prompt of each conversation."""
        found = []
        for messages in conversations:
            try:
                text = self.prompt(messages)
                found.append(Prompt(text, self.tokenizer(text, add_special_tokens=False).input_ids))
            except Unusable as error:
                found.append(Prompt("", [], "special_token" if error.reason == "special_token" else "refused"))
        return found

    def room(self, prompt: list[int]) -> int:
        """The most tokens that an answer to a prompt may have; 0 where there is no prompt."""
        return min(self.max_new_tokens, (self.positions or sys.maxsize) - len(prompt)) if prompt else 0

    def read(self, made: list[int], finished: bool) -> Answer:
        """The answer of generated ids: the text before the first end of turn."""
        end = next((n for n, token in enumerate(made) if token in self.ends), len(made))
        text = self.tokenizer.decode(made[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        return Answer(text, finished, None if self.special.isdisjoint(made[:end]) else "special_token")

    def reopened(self, answer: Answer, text: str) -> Answer:
        """The answer, with the mark of reasoning that its prompt's text ends with."""
        opened = _OPENED.search(text) if answer.text else None
        return replace(answer, text=opened[0] + answer.text) if opened else answer


class Generator(Prompter):
    """Generates answers with one model.

    Args:
        model: a loaded causal language model. tokenizer: its fast tokenizer.
        max_new_tokens: per answer; fewer where the model's positions run out.
    """

    def __init__(self, model, tokenizer, max_new_tokens: int):
        super().__init__(tokenizer, max_new_tokens, turn_ends(model), positions_of(model.config))
        self.model = model
        rows, padding = model.get_input_embeddings().num_embeddings, tokenizer.pad_token_id
        self.padding = padding if padding is not None and padding < rows else self.ends[0]

    def generate(self, conversations: list[list[dict[str, str]]], temperature: float) -> list[Answer]:
        """One answer per conversation, of as many tokens as its own prompt leaves positions for.

        Where the prompt opens the answer's reasoning (`<think>`), the answer's text begins with that mark.
        """
        prompts = self.prompts(conversations)
        answers = [Answer("", False, prompt.problem) for prompt in prompts]
        rooms = [self.room(prompt.ids) for prompt in prompts]
        together = [n for n, room in enumerate(rooms) if room == self.max_new_tokens]
        for group in ([together] if together else []) + [[n] for n in range(len(prompts)) if n not in together]:
            if rooms[group[0]] > 0:
                found = self._complete([prompts[n].ids for n in group], rooms[group[0]], temperature)
                for n, answer in zip(group, found, strict=True):
                    answers[n] = self.reopened(answer, prompts[n].text)
        return answers

    def _complete(self, prompts: list[list[int]], room: int, temperature: float) -> list[Answer]:
        """One answer of at most `room` tokens per prompt: greedy at temperature 0, else sampled at it alone."""
        import torch
        from transformers import GenerationConfig

        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.padding)
        mask = torch.zeros_like(ids)
        for n, prompt in enumerate(prompts):
            ids[n, longest - len(prompt) :], mask[n, longest - len(prompt) :] = torch.tensor(prompt), 1
        ends = {"eos_token_id": self.ends, "pad_token_id": self.padding, "stop_strings": self.stops}
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature > 0 else {}
        own = self.model.generation_config  # whose values `generate` takes for all that it is not given
        self.model.generation_config = GenerationConfig(max_new_tokens=room, **ends, **sampling)
        try:
            with torch.inference_mode():
                found = self.model.generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    tokenizer=self.tokenizer,  # for stop strings
                )
        finally:
            self.model.generation_config = own
        return [self._answer(made, room) for made in found[:, longest:].tolist()]

    def _answer(self, made: list[int], room: int) -> Answer:
        """The answer of generated ids: the text before the first end of turn, or up to a stop string of the model's
        settings, after which there is padding or nothing."""
        size = len(made)
        while size and made[size - 1] == self.padding:
            size -= 1
        finished = size < len(made) or len(made) < room or not set(self.ends).isdisjoint(made)
        return self.read(made[:size], finished)
