"""Chat templates: the tokenizer's own, one from a file, or the built-in one of its family."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fusechat_fuse.errors import InputError, first_line
from fusechat_fuse.text.built_in_templates import BUILT_IN, family_of
from fusechat_fuse.text.messages import Unusable
from fusechat_fuse.text.tools import as_texts

MAX_REFUSED_SHARE = 0.1
OTHER_TEMPLATE = "Set template to a built-in name or a .jinja file that keeps them"
_PLAIN_TEXT = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
_TODAY = datetime(2024, 7, 26)  # the default date of Llama-3.1's template; renderings must not depend on the day


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the special tokens of its own family.

    `bos` and `end_of_turn` are the texts it renders ("" for no BOS), `variables` the special tokens it may name. A
    token that opens every turn is not a BOS, whatever the tokenizer calls it. `built_in`: the name of the built-in
    template that is used because the tokenizer has none.
    """

    name: str
    source: str
    bos: str
    end_of_turn: str
    variables: tuple[tuple[str, str], ...]
    built_in: str | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of everything that decides what it renders."""
        return hashlib.sha256(repr((self.source, self.bos, self.end_of_turn, self.variables)).encode()).hexdigest()

    def render(self, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        """The conversation as transformers renders it, but with a fixed date, perhaps with the generation prompt of the
        next answer; the first message may hold the list of `tools`. Raises: Unusable where the template refuses it."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        today = {"date_string": _TODAY.strftime("%d %b %Y"), "strftime_now": _TODAY.strftime}
        tools = messages[0].get("tools") if messages else None
        messages = [{k: v for k, v in message.items() if k not in ("weight", "tools")} for message in messages]
        context = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generation_prompt}
        try:
            return _compile_jinja_template(self.source).render(**context, **today, **dict(self.variables))
        except Exception as error:  # a template is a program: division by zero, recursion, ...
            raise Unusable("template", f"the chat template refuses the conversation ({first_line(error)})") from error


def own_variables(tokenizer) -> tuple[tuple[str, str], ...]:
    """The tokenizer's named special tokens, as a template may name them."""
    named = tokenizer.special_tokens_map.items()
    return tuple(sorted((key, str(value)) for key, value in named if isinstance(value, str)))


def special_texts(tokenizer) -> dict[str, int]:
    """Text -> id of every special token of a tokenizer."""
    added = tokenizer.added_tokens_decoder
    named = set(tokenizer.all_special_ids)
    return {token.content: i for i, token in added.items() if token.special or i in named}


def added_texts(tokenizer) -> dict[str, int]:
    """Text -> id of every token added to a tokenizer's vocabulary, special or not."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}


def control_texts(tokenizer, template: ChatTemplate) -> set[str]:
    """Texts that no content may hold: special tokens, and added ones that this or the tokenizer's own template uses.

    Some tokenizers add their turn markers without calling them special; in a content they would still act as markers.
    Marks of reasoning that are not called special (Qwen3's `<think>`) are what such a model writes itself.
    """
    both = [each for each in (template, template_of(tokenizer)) if each]
    sources = [text for each in both for text in (each.source, each.end_of_turn, each.bos)]
    used = {text for text in added_texts(tokenizer) if not text.isspace() and any(text in s for s in sources)}
    return (used - REASONING_MARKS) | set(special_texts(tokenizer))


def check_contents(messages: list[dict[str, Any]], reserved: re.Pattern[str]) -> None:
    """Raise Unusable where a message (its calls of tools too) holds one of the reserved texts: in ids it would be a
    special token."""
    for n, message in enumerate(messages):
        texts = [text for text in as_texts(message).values() if isinstance(text, str)]
        if found := next(filter(None, map(reserved.search, texts)), None):
            raise Unusable("special_token", f"message {n} holds the text of the special token {found[0]!r}")


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the leftmost, then longest, of these texts."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True) if text) or "(?!)")


# spellings of the tokens around a reasoning text: a family that owns them writes them into answers, as text
REASONING_MARKS = {f"<{slash}{name}>" for slash in ("", "/") for name in ("think", "thinking", "thought", "reasoning")}
_PROBE = [{"role": "user", "content": "QZ0ZQ"}, {"role": "assistant", "content": "QZ1ZQ"}]


def _own(name: str, source: str, tokenizer) -> ChatTemplate:
    """A template, with the BOS and end of turn that it renders for this tokenizer."""
    template = ChatTemplate(name, source, "", "", own_variables(tokenizer))
    head, _, tail = template.render(_PROBE).partition("QZ1ZQ")
    found = any_of(text for text in added_texts(tokenizer) if not text.isspace()).search(tail)
    end_of_turn = found[0] if found else ""
    bos = dict(template.variables).get("bos_token", "")
    if not head.startswith(bos) or _opens_turns(bos, head, end_of_turn):
        bos = ""
    return replace(template, bos=bos, end_of_turn=end_of_turn)


def _opens_turns(bos: str, head: str, end_of_turn: str) -> bool:
    """Whether the text at the start of the conversation also starts the answer (ChatML with `<|im_start|>` as BOS)."""
    return bos != end_of_turn and bos in head.removeprefix(bos)


def _built_in(name: str) -> ChatTemplate:
    family = BUILT_IN[name]
    return ChatTemplate(name, family.source, family.bos, family.end_of_turn, (("bos_token", family.bos),), name)


def native_template(tokenizer, name: str = "the model", remedy: str | None = None) -> ChatTemplate:
    """The tokenizer's own chat template, or the built-in one of its family where it has none.

    Args:
        tokenizer: transformers fast tokenizer. name: its name in the error. remedy: what to do about it there.
    Raises: InputError where it has no template and its special tokens are of no known family.
    """
    if tokenizer.chat_template:
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:  # several named templates, none of them the default
            raise InputError(
                f"chat template for {name}: expected one named default, got {', '.join(tokenizer.chat_template)}. "
                f"{remedy or 'Set template to a .jinja file'}."
            ) from error
        return _own("native", source, tokenizer)
    family = family_of(set(added_texts(tokenizer)))
    if family is None:
        remedy = remedy or f"Set template to one of {', '.join(BUILT_IN)}, or a .jinja file"
        raise InputError(
            f"chat template for {name}: expected one in its tokenizer, got none and no special tokens of a known "
            f"family. {remedy}."
        )
    return _built_in(family)


def template_of(tokenizer) -> ChatTemplate | None:
    """The `native_template` of a tokenizer, None where it has none."""
    try:
        return native_template(tokenizer)
    except InputError:
        return None


def resolve_template(template: str, tokenizer, pivot_tokenizer=None) -> ChatTemplate:
    """The template that the option `template` names.

    Args:
        template: pivot (the pivot's own), native (the model's own), a built-in name, text (contents alone, an EOS after
            each answer: what base models are trained on), or the path of a Jinja file.
        tokenizer: the model's. pivot_tokenizer: the pivot's; None means that the model is the pivot.
    Returns: ChatTemplate; BOS and end of turn are still those of its own family (`ConversationEncoder` replaces them by
        the model's).
    Raises: InputError for an unknown name, an unreadable file, or a tokenizer without a template.
    """
    if template in ("native", "pivot"):
        own = template == "native" or pivot_tokenizer is None
        chosen, unnamed = (tokenizer, "the model") if own else (pivot_tokenizer, "the pivot")
        return replace(native_template(chosen, getattr(chosen, "name_or_path", "") or unnamed), name=template)
    if template in BUILT_IN:
        return _built_in(template)
    if template == "text":
        return _own("text", _PLAIN_TEXT, tokenizer)
    path = Path(template)
    if not path.is_file():
        names = ", ".join(["pivot", "native", *BUILT_IN, "text"])
        raise InputError(f"chat template for {template!r}: expected one of {names} or a .jinja file, got neither.")
    try:
        return _own(path.name, path.read_text(encoding="utf-8"), tokenizer)
    except (UnicodeDecodeError, Unusable) as error:
        raise InputError(
            f"chat template for {path}: expected a Jinja chat template, got {error}. Correct it."
        ) from error


def check_template(skipped: list[dict], total: int) -> None:
    """Raise InputError if more than MAX_REFUSED_SHARE of the conversations are refused by the chat template, or because
    they hold texts of special tokens (one conversation may)."""
    for reason, at_least, what, refusal, remedy in (
        ("template", 1, "chat template", "that it does not keep", OTHER_TEMPLATE),
        ("special_token", 2, "special tokens", "that hold the text of one", "Take these texts out of the data"),
    ):
        refused = Counter(entry["detail"] for entry in skipped if entry["reason"] == reason)
        if (count := refused.total()) > MAX_REFUSED_SHARE * total and count >= at_least:
            raise InputError(
                f"{what} for the data: expected to leave out at most {MAX_REFUSED_SHARE:.0%}, got {count} of {total} "
                f"conversations {refusal} ({refused.most_common(1)[0][0]}). {remedy}."
            )


def end_of_turn_of(tokenizer) -> str:
    """The text of a tokenizer's own end-of-turn token: the one its template puts after an answer, else its EOS.

    Raises: InputError where it has neither.
    """
    template = template_of(tokenizer)
    text = template.end_of_turn if template and template.end_of_turn in added_texts(tokenizer) else tokenizer.eos_token
    if not text:
        raise InputError("end of turn for the tokenizer: expected an EOS token, got none. Set tokenizer.eos_token.")
    return text


def bos_of(tokenizer) -> str:
    """The text of the BOS that a tokenizer begins a conversation with: the token that its template or post-processor
    puts first and that does not open every turn; "" if there is none."""
    bos = tokenizer.bos_token
    if not bos:
        return ""
    if template := template_of(tokenizer):
        if template.bos == bos:
            return bos
        if _opens_turns(bos, template.render(_PROBE).partition("QZ1ZQ")[0], template.end_of_turn):
            return ""
    return bos if list(tokenizer("a").input_ids[:1]) == [tokenizer.bos_token_id] else ""
