"""`inspect`: the figures of a store directory, and one conversation token by token, as text or as a page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fusechat_fuse.alignment.certificate import summary_lines
from fusechat_fuse.alignment.combination import combination_lines
from fusechat_fuse.errors import InputError, of_output
from fusechat_fuse.inspection.conversation_view import conversation_view, names_in, stored_tokens
from fusechat_fuse.store.card import source_names
from fusechat_fuse.store.cross_entropy import pivot_cross_entropy, source_cross_entropy
from fusechat_fuse.store.files import write_atomic
from fusechat_fuse.store.shards import Representation, load_representation


def inspect_path(
    path: str | Path,
    *,
    row: str | int = "0",
    html: str | Path | None = None,
    source_representation: str | Path | None = None,
    tokens: int = 40,
) -> str:
    """What is in a directory that `represent`, `align` or `combine` wrote.

    Args:
        path: the directory.
        row: which conversation: its number, or its id.
        html: file to write a self-contained page of this conversation to (aligned directories).
        source_representation: where the source's representation is now, if it was moved.
        tokens: how many predicted tokens the text shows.

    Returns:
        Text for a terminal: counts, sizes, the certificate, one readable conversation.

    Raises:
        InputError: no such row; a page was asked for but the source's representation cannot be read.
    """
    opened = load_representation(path)
    kind = opened.manifest["kind"]
    has_source = "join" in opened.manifest  # what import made of released data has no source representation
    if html is not None and not has_source:
        got = "imported data" if kind == "aligned" else f"a {kind}"
        raise InputError(
            f"page for {opened.path}: expected an aligned directory, got {got}. Give a directory that align wrote."
        )
    number = _row_number(opened, row)
    lines = _overview(opened)
    if has_source:
        view = conversation_view(opened, number, source_representation, required=html is not None)
        lines += [f"conversation {view['id']}, {view['mapping']} mapping", *_token_lines(view["tokens"], tokens)]
        if html is not None:
            from fusechat_fuse.inspection.page import page

            if Path(html).exists() and not Path(html).is_file():
                raise InputError(f"page for {opened.path}: expected a file's name, got {html}. Choose another.")
            try:
                write_atomic(Path(html), page(view).encode())
            except OSError as error:
                raise of_output(error) from None
            lines.append(f"page written to {html}")
        return "\n".join(lines)
    of_kind = _combined_lines if kind == "combined" else _representation_lines
    return "\n".join([*lines, *of_kind(opened, opened[number], tokens)])


def _row_number(opened: Representation, row) -> int:
    text = str(row)
    if text in opened.ids:
        return opened.ids.index(text)
    if text.lstrip("-").isdigit() and -len(opened) <= int(text) < len(opened):
        return int(text) % len(opened)
    raise InputError(
        f"row for {opened.path}: expected a number below {len(opened)} or an id, got {row!r}. "
        f"The first id is {opened.ids[0]!r}."
    )


def _overview(opened: Representation) -> list[str]:
    manifest, counts = opened.manifest, opened.manifest["counts"]
    model = (manifest.get("model") or {}).get("name")
    lines = [
        f"{opened.path}: {manifest['kind']} of {model}",
        f"{counts['conversations']} conversations, {counts['tokens']} tokens, {counts['predicted_tokens']} predicted",
        f"shards: {counts['bytes'] / 1e6:.2f} MB, {counts['bytes_per_predicted_token']:.1f} bytes per predicted token",
        f"options {json.dumps(manifest.get('options'), sort_keys=True)}",
    ]
    if released := manifest.get("released"):
        lines.append("released data: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in released.items()))
    if join := manifest.get("join"):
        left = ", ".join(f"{join[key]['count']} {key.replace('_', ' ')}" for key in join if key != "joined")
        lines.append(f"source {manifest['source']['model']}; {join['joined']} conversations joined, {left}")
        lines += summary_lines(manifest["certificate"])
    if manifest["kind"] == "combined":
        lines += combination_lines(manifest)
    return lines


def _representation_lines(opened: Representation, row: dict, tokens: int) -> list[str]:
    name = names_in(opened)
    lines = [f"conversation {row['id']}: {len(row['input_ids'])} tokens, {len(row['predicted'])} predicted"]
    for n, t in enumerate(row["predicted"][:tokens]):
        top = "  ".join(
            f"{name(i)} {np.exp(lp):.3f}"
            for i, lp in zip(row["topk_ids"][n][:4], row["topk_logprobs"][n][:4].astype(float))
        )
        where = f"{row['message'][n]}:{row['start'][n]}-{row['end'][n]}"
        lines.append(f"{where:>12}  {name(row['input_ids'][t]):<16} ce {row['ce'][n]:7.3f}   {top}")
    return lines + _more(len(row["predicted"]), tokens)


def _combined_lines(opened: Representation, row: dict, tokens: int) -> list[str]:
    """The source of the conversation, its cross-entropy, and the distributions that training uses."""
    names, ce_unit, n = source_names(opened.manifest), opened.manifest["options"]["ce_unit"], -1
    if row.get("source_index") is not None:
        n = int(row["source_index"][0])
    who = f"taken from source {n}, {names[n]}" if n >= 0 else "a mixture of its sources"
    ces = f"{source_cross_entropy(row, ce_unit):.4f} (pivot {pivot_cross_entropy(row, ce_unit):.4f})"
    head = f"conversation {row['id']}, {who}; cross-entropy {ces} nats per {ce_unit}"
    return [head, *_token_lines(stored_tokens(row, names_in(opened)), tokens)]


def _more(total: int, tokens: int) -> list[str]:
    return [f"... and {total - tokens} more predicted tokens"] if total > tokens else []


def _token_lines(shown: list[dict], tokens: int) -> list[str]:
    lines = []
    for token in shown[:tokens]:
        top = "  ".join(f"{name} {p:.3f}" for name, p in token["row"][:4])
        safe = " safe" if token.get("safe") else ""
        lines.append(f"{token['text']:<16} {token['class'] + safe:<12} mass {token['mass']:.3f}   {top}")
    return lines + _more(len(shown), tokens)
