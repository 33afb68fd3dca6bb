"""A model with its chat template: conversations in, answers out, in batches that are padded on the left."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fusechat_fuse.errors import first_line
from fusechat_fuse.models.files import positions_of
from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.templates import added_texts, native_template, special_texts

_PLACEHOLDER = "QZ1ZQ"  # stands for the answer in a rendered prompt


@dataclass(frozen=True)
class Answer:
    """A generated text, and whether the model ended its turn within the tokens it had.

    Attributes:
        problem: refused (the model's chat template takes no such conversation) or special_token (one stood within the
            answer, and the text lacks it); else None.
    """

    text: str
    finished: bool
    problem: str | None = None


class Generator:
    """Generates answers with one model.

    Args:
        model: a loaded causal language model. tokenizer: its fast tokenizer.
        max_new_tokens: per answer; fewer where the model's positions run out.
    """

    def __init__(self, model, tokenizer, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.template = native_template(tokenizer)
        ends = model.generation_config.eos_token_id
        found = {ends} if isinstance(ends, int) else set(ends or ())
        found |= {tokenizer.eos_token_id, added_texts(tokenizer).get(self.template.end_of_turn)} - {None}
        self.ends = sorted(found)
        self.special = set(special_texts(tokenizer).values())
        self.padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.ends[0]
        self.positions = positions_of(model.config)

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids up to where the answer begins. Raises: Unusable where the template refuses the messages."""
        if self.tokenizer.chat_template:
            try:
                text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template is a program: division by zero, recursion, ...
                raise Unusable("template", f"the chat template refuses the messages ({first_line(error)})") from error
        else:
            text = self.template.render([*messages, {"role": "assistant", "content": _PLACEHOLDER}]).partition(
                _PLACEHOLDER
            )[0]
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def generate(self, conversations: list[list[dict[str, str]]], temperature: float) -> list[Answer]:
        """One answer per conversation, of as many tokens as its own prompt leaves positions for."""
        prompts, answers = [], [Answer("", False)] * len(conversations)
        for n, messages in enumerate(conversations):
            try:
                prompts.append(self.prompt(messages))
            except Unusable:
                prompts.append([])
                answers[n] = Answer("", False, "refused")
        positions = self.positions or sys.maxsize
        rooms = [min(self.max_new_tokens, positions - len(prompt)) if prompt else 0 for prompt in prompts]
        together = [n for n, room in enumerate(rooms) if room == self.max_new_tokens]
        for group in ([together] if together else []) + [[n] for n in range(len(prompts)) if n not in together]:
            if rooms[group[0]] > 0:
                found = self._complete([prompts[n] for n in group], rooms[group[0]], temperature)
                for n, answer in zip(group, found, strict=True):
                    answers[n] = answer
        return answers

    def _complete(self, prompts: list[list[int]], room: int, temperature: float) -> list[Answer]:
        """One answer of at most `room` tokens per prompt."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.padding)
        mask = torch.zeros_like(ids)
        for n, prompt in enumerate(prompts):
            ids[n, longest - len(prompt) :], mask[n, longest - len(prompt) :] = torch.tensor(prompt), 1
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=room,
                eos_token_id=self.ends,
                pad_token_id=self.padding,
                **sampling,
            )
        return [self._answer(made) for made in found[:, longest:].tolist()]

    def _answer(self, made: list[int]) -> Answer:
        """The answer of generated ids: the text before the first end of turn."""
        end = next((n for n, token in enumerate(made) if token in self.ends), len(made))
        text = self.tokenizer.decode(made[:end], skip_special_tokens=True).strip()
        problem = None if self.special.isdisjoint(made[:end]) else "special_token"
        return Answer(text, end < len(made), problem)
