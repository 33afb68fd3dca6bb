"""Look into a representation or an alignment: figures, and one conversation token by token.

`inspect_path` gives the text for a terminal and, with `html`, writes a page (`inspection_page`). An aligned directory
holds the pivot's tokens only; the source's are read from the representation it was made of, whose path the manifest
names.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fusechat_fuse.alignment.certificate import summary_lines
from fusechat_fuse.alignment.correspondence import EXACT, INSIDE
from fusechat_fuse.alignment.streams import align_batch, became, make_batch
from fusechat_fuse.alignment.tokenizer_pair import Pair, load_counts
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.shards import Representation, load_representation
from fusechat_fuse.store.tokenizers import read_tokenizer
from fusechat_fuse.text.tokens import token_table

CLASSES = {EXACT: "exact", INSIDE: "inside"}
_SHOWN = 40


def inspect_path(path, *, row=0, html=None, source_representation=None, tokens: int = _SHOWN) -> str:
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
    number = _row_number(opened, row)
    lines = _overview(opened)
    record = opened[number]
    if opened.manifest["kind"] == "aligned":
        view = conversation_view(opened, number, source_representation, required=html is not None)
        lines += _aligned_lines(view, tokens)
        if html is not None:
            from fusechat_fuse.alignment.inspection_page import page

            Path(html).write_text(page(view, summary_lines(opened.manifest["certificate"])), encoding="utf-8")
            lines.append(f"page written to {html}")
        return "\n".join(lines)
    if html is not None:
        raise InputError(
            f"page for {opened.path}: expected an aligned directory, got a {opened.manifest['kind']}. "
            "Give a directory that align wrote."
        )
    return "\n".join([*lines, *_representation_lines(opened, record, tokens)])


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
    size = sum(file.stat().st_size for file in opened.path.rglob("*") if file.is_file())
    model = (manifest.get("model") or {}).get("name")
    lines = [
        f"{opened.path}: {manifest['kind']} of {model}",
        f"{counts['conversations']} conversations, {counts['tokens']} tokens, {counts['predicted_tokens']} predicted; "
        f"{size / 1e6:.1f} MB, {counts['bytes_per_predicted_token']:.1f} bytes per predicted token",
        f"options {json.dumps(manifest.get('options'), sort_keys=True)}",
    ]
    if manifest["kind"] == "aligned":
        join = manifest["join"]
        left = ", ".join(f"{join[key]['count']} {key.replace('_', ' ')}" for key in join if key != "joined")
        lines.append(f"source {manifest['source']['model']}; {join['joined']} conversations joined, {left}")
        lines += summary_lines(manifest["certificate"])
    if manifest["kind"] == "combined":
        lines.append(f"taken {json.dumps(manifest['taken'])}")
    return lines


def readable(piece: bytes | None) -> str:
    """Bytes of a token for a reader: text where they are characters, else escapes; blanks and line ends visible."""
    if piece is None:
        return "(special)"
    text = piece.decode("utf-8", "backslashreplace")
    return "".join(
        {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in text
    )


class _Names:
    """Shows ids of one tokenizer."""

    def __init__(self, path):
        table = token_table(read_tokenizer(path))
        self.pieces, self.spelled = table.pieces, table.bytes

    def __call__(self, i: int) -> str:
        if not 0 <= i < len(self.pieces) or self.pieces[i] is None:
            return f"#{i}"
        return self.pieces[i] if self.spelled[i] is None else readable(self.spelled[i])


def _representation_lines(opened: Representation, row: dict, tokens: int) -> list[str]:
    name = _Names(opened.path)
    lines = [f"conversation {row['id']}: {len(row['input_ids'])} tokens, {len(row['predicted'])} predicted"]
    for n, t in enumerate(row["predicted"][:tokens]):
        top = "  ".join(
            f"{name(i)} {np.exp(lp):.3f}"
            for i, lp in zip(row["topk_ids"][n][:4], row["topk_logprobs"][n][:4].astype(float))
        )
        where = f"{row['message'][n]}:{row['start'][n]}-{row['end'][n]}"
        lines.append(f"{where:>12}  {name(row['input_ids'][t]):<16} ce {row['ce'][n]:7.3f}   {top}")
    return lines + _more(len(row["predicted"]), tokens)


def _more(total: int, tokens: int) -> list[str]:
    return [f"... and {total - tokens} more predicted tokens"] if total > tokens else []


def conversation_view(opened: Representation, number: int, source_representation=None, *, required=True) -> dict:
    """One aligned conversation with both tokenizations: JSON-able, for the terminal and the page.

    Returns:
        id, mapping, models; messages: per message the stretches {pivot, source} (numbers of tokens over the same text);
        tokens: of the pivot, each with text, class, safe, mass, unmapped, answer (number of a source token),
        candidates and the mapped row; source_tokens: text and ce. Without the source's representation
        (`required=False`) messages is None and the tokens hold what is stored.
    """
    row, manifest = opened[number], opened.manifest
    source = _source_of(opened, source_representation, required)
    pivot_name = _Names(opened.path)
    view = {
        "id": row["id"],
        "mapping": manifest["options"]["mapping"],
        "models": [(manifest.get(key) or {}).get("name") for key in ("model", "source_model")],
    }
    if source is None:
        return view | {"messages": None, "tokens": _stored_tokens(row, pivot_name)}
    pair = Pair.load(opened, source)
    batch = make_batch([row], [_matching(source, row)], pair)
    mapping = manifest["options"]["mapping"]
    counts = None
    if mapping == "statistics" and not pair.identity:
        counts = load_counts(manifest["inputs"]["counts"] or opened.path, pair)
    vocab = pair.vocabularies(mapping, counts)
    match, mapped, safe = align_batch(batch, pair, vocab, mapping, manifest["options"]["safe_only"])
    source_name = _Names(source.path)
    pivot_tokens, source_tokens = [], []
    for q in range(len(batch.source)):
        spelled = pair.source.bytes[batch.source.ids[q]]
        source_tokens.append(
            {"text": _own_text(spelled, batch.source, q, source_name), "ce": float(batch.source.ce[q])}
        )
    for p in range(len(batch.pivot)):
        q = int(match.source[p])
        candidates = became(batch, vocab, mapping, p, q) if q >= 0 else []
        pivot_tokens.append(
            {
                "text": _own_text(pair.pivot.bytes[batch.pivot.ids[p]], batch.pivot, p, pivot_name),
                "class": CLASSES.get(int(mapped.kind[p]), "none"),
                "safe": bool(safe[p]),
                "mass": float(mapped.mass[p]),
                "unmapped": sum(c["probability"] for c in candidates if c["pivot_id"] < 0),
                "answer": q,
                "candidates": [
                    {
                        "token": source_name(c["id"]),
                        "p": round(c["probability"], 6),
                        "became": pivot_name(c["pivot_id"]) if c["pivot_id"] >= 0 else "",
                        "why": c["why"],
                        "actual": c["actual"],
                    }
                    for c in candidates
                ],
                "row": sorted(
                    (
                        [pivot_name(int(i)), round(float(v), 6)]
                        for i, v in zip(mapped.ids[p], mapped.probs[p])
                        if i >= 0
                    ),
                    key=lambda entry: -entry[1],
                ),
            }
        )
    messages = _stretches(batch, match, pivot_tokens, source_tokens)
    return view | {"messages": messages, "tokens": pivot_tokens, "source_tokens": source_tokens}


def _own_text(spelled: bytes | None, stream, n: int, name: _Names) -> str:
    if spelled is None:
        return name(int(stream.ids[n]))
    return readable(spelled[min(int(stream.header[n]), len(spelled)) :])


def _source_of(opened: Representation, source_representation, required: bool) -> Representation | None:
    path = source_representation or opened.manifest["inputs"]["source"]
    try:
        return load_representation(path)
    except InputError:
        if required or source_representation:
            raise InputError(
                f"source representation for {opened.path}: expected it at {path}, got nothing readable there. "
                "Name its place with source_representation."
            ) from None
        return None


def _matching(source: Representation, row: dict) -> dict:
    for n, name in enumerate(source.ids):
        if name == row["id"] and source.stored_row(n).get("content_hash") == row.get("content_hash"):
            return source[n]
    raise InputError(
        f"conversation {row['id']!r} for {source.path}: expected it there with the same content, got none. "
        "Give the representation that was aligned."
    )


def _stored_tokens(row: dict, name: _Names) -> list[dict]:
    tokens = []
    for n, t in enumerate(row["predicted"]):
        kept = [(name(int(i)), float(v)) for i, v in zip(row["source_ids"][n], row["source_probs"][n]) if i >= 0]
        tokens.append(
            {
                "text": name(int(row["input_ids"][t])),
                "class": "answered" if row["mapped_mass"][n] > 0 else "none",
                "mass": float(row["mapped_mass"][n]),
                "row": sorted(kept, key=lambda entry: -entry[1]),
            }
        )
    return tokens


def _stretches(batch, match, pivot_tokens, source_tokens) -> list[list[dict]]:
    """Tokens grouped by message (line high bits), then into stretches from one common start to the next."""
    common = set(batch.pivot.start[match.kind == EXACT].tolist())
    sides = (("pivot", batch.pivot, pivot_tokens), ("source", batch.source, source_tokens))
    items = sorted((int(stream.start[n]), side, n) for side, stream, tokens in sides for n in range(len(tokens)))
    messages: list[list[dict]] = []
    before = None
    for place, side, n in items:
        message = place >> 31
        if message != before:
            messages.append([])
        if message != before or (place in common and messages[-1][-1]["at"] != place):
            messages[-1].append({"at": place, "pivot": [], "source": []})
        messages[-1][-1][side].append(n)
        before = message
    return messages


def _aligned_lines(view: dict, tokens: int) -> list[str]:
    lines = [f"conversation {view['id']}, {view['mapping']} mapping"]
    for token in view["tokens"][:tokens]:
        top = "  ".join(f"{name} {p:.3f}" for name, p in token["row"][:4])
        safe = " safe" if token.get("safe") else ""
        lines.append(f"{token['text']:<16} {token['class'] + safe:<12} mass {token['mass']:.3f}   {top}")
    return lines + _more(len(view["tokens"]), tokens)
