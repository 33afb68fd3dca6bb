"""One aligned conversation with both tokenizations, as plain data, for `inspect` in the terminal and as a page.

An aligned directory holds the pivot's tokens only; the source's tokens are read from the representation that was
aligned, whose path is in the manifest, and aligned again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from fusechat_fuse.alignment.candidates import Stream
from fusechat_fuse.alignment.correspondence import EXACT, INSIDE, message_of
from fusechat_fuse.alignment.mappings import MAPPINGS
from fusechat_fuse.alignment.run import origin
from fusechat_fuse.alignment.streams import Batch, align_batch, make_batch
from fusechat_fuse.alignment.tokenizer_pair import Side, TokenizerPair, load_counts
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.shards import Representation, load_representation
from fusechat_fuse.store.tokenizers import read_tokenizer
from fusechat_fuse.text.tokens import TokenTable, token_table

Names = Callable[[int], str]  # id -> readable text
CLASSES = {EXACT: "exact", INSIDE: "inside"}


def readable(piece: bytes | None) -> str:
    """Bytes of a token for a reader: text where they are characters, else escapes; blanks and line ends visible."""
    if piece is None:
        return "(special)"
    text = piece.decode("utf-8", "backslashreplace")
    return "".join(
        {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}.get(c, c if c.isprintable() else repr(c)[1:-1]) for c in text
    )


def names_of(tokenizer: TokenTable | Side) -> Names:
    """Readable text for the ids of one tokenizer, by their pieces and bytes."""

    @cache
    def name(i: int) -> str:
        piece = tokenizer.pieces[i] if 0 <= i < len(tokenizer.pieces) else None
        own = None if piece is None else tokenizer.bytes[i]
        return f"#{i}" if piece is None else piece if own is None else readable(own)

    return name


def names_in(store: Representation) -> Names:
    """Readable text for the ids of the tokenizer in a store."""
    return names_of(token_table(read_tokenizer(store)))


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
    view = {
        "id": row["id"],
        "mapping": manifest["options"]["mapping"],
        "models": [(manifest.get(key) or {}).get("name") for key in ("model", "source_model")],
    }
    if source is None:
        return view | {"messages": None, "tokens": stored_tokens(row, names_in(opened))}
    pair = TokenizerPair(opened, source)
    batch = make_batch([row], [_matching(source, row)], pair)
    mapping = MAPPINGS[manifest["options"]["mapping"]]
    counts = None
    if mapping.needs_counts and not pair.identity:
        counts = load_counts(manifest["inputs"]["counts"] or opened.path, pair)
    vocab = pair.vocabularies(mapping, counts)
    mapped = align_batch(batch, pair, vocab, mapping, manifest["options"]["safe_only"])
    outcomes = mapping.outcomes(batch.pivot, batch.source, batch.match, vocab)
    probs = np.exp(batch.source.topk_logprobs.astype(np.float64))  # [Q, K]
    pivot_name, source_name = names_of(pair.pivot), names_of(pair.source)
    source_tokens = [
        {"text": _own_text(pair.source, batch.source, q, source_name), "ce": float(ce)}
        for q, ce in enumerate(batch.source.ce)
    ]
    pivot_tokens = [
        {
            "text": _own_text(pair.pivot, batch.pivot, p, pivot_name),
            "class": CLASSES.get(int(mapped.kind[p]), "none"),
            "safe": bool(batch.safe[p]),
            "mass": float(mapped.mass[p]),
            "unmapped": sum(float(probs[q, k]) for k, (i, _) in enumerate(outcomes[p]) if i < 0),
            "answer": q,
            "candidates": [
                {
                    "token": source_name(int(batch.source.topk_ids[q, k])),
                    "p": float(probs[q, k]),
                    "became": pivot_name(i) if i >= 0 else "",
                    "why": why,
                    "actual": bool(batch.source.topk_ids[q, k] == batch.source.ids[q]),
                }
                for k, (i, why) in enumerate(outcomes[p])
            ],
            "row": _row(mapped.ids[p], mapped.probs[p], pivot_name),
        }
        for p, q in enumerate(batch.match.source.tolist())
    ]
    messages = _stretches(batch, pivot_tokens, source_tokens)
    return view | {"messages": messages, "tokens": pivot_tokens, "source_tokens": source_tokens}


def _row(ids: np.ndarray, probs: np.ndarray, name: Names) -> list[tuple[str, float]]:
    """(name, P) of the entries, most likely first."""
    kept = [(name(int(i)), float(v)) for i, v in zip(ids, probs) if i >= 0]
    return sorted(kept, key=lambda entry: -entry[1])


def _own_text(side: Side, stream: Stream, n: int, name: Names) -> str:
    spelled = side.bytes[stream.ids[n]]
    return name(int(stream.ids[n])) if spelled is None else readable(spelled[int(stream.header[n]) :])


def _source_of(opened: Representation, source_representation, required: bool) -> Representation | None:
    path = source_representation or opened.manifest["inputs"]["source"]
    try:
        source = load_representation(path)
        if origin(source) == opened.manifest["source"]:
            return source
        got = "another representation"
    except InputError as error:
        got = f"nothing readable ({error})"
    if required or source_representation:
        raise InputError(
            f"source representation for {opened.path}: expected the one it was aligned from at {path}, got {got}. "
            "Give its directory as source_representation."
        )
    return None


def _matching(source: Representation, row: dict) -> dict:
    for n, name in enumerate(source.ids):
        if name == row["id"] and source.stored_row(n).get("content_hash") == row.get("content_hash"):
            return source[n]
    raise InputError(
        f"conversation {row['id']!r} for {source.path}: expected it there with the same content, got none. "
        "Give the representation that was aligned."
    )


def stored_tokens(row: dict, name: Names) -> list[dict]:
    """Tokens of an aligned or combined row as it is stored: text, class (answered or none), mass and the row."""
    return [
        {
            "text": name(int(row["input_ids"][t])),
            "class": "answered" if row["mapped_mass"][n] > 0 else "none",
            "mass": float(row["mapped_mass"][n]),
            "row": _row(row["source_ids"][n], row["source_probs"][n], name),
        }
        for n, t in enumerate(row["predicted"])
    ]


def _stretches(batch: Batch, pivot_tokens, source_tokens) -> list[list[dict]]:
    """Tokens grouped by message, then into stretches from one common start to the next."""
    common = set(batch.pivot.start[batch.match.kind == EXACT].tolist())
    sides = (("pivot", batch.pivot, pivot_tokens), ("source", batch.source, source_tokens))
    items = sorted((int(stream.start[n]), side, n) for side, stream, tokens in sides for n in range(len(tokens)))
    messages: list[list[dict]] = []
    before = None
    for place, side, n in items:
        message = message_of(place)
        if message != before:
            messages.append([])
        if message != before or (place in common and messages[-1][-1]["at"] != place):
            messages[-1].append({"at": place, "pivot": [], "source": []})
        messages[-1][-1][side].append(n)
        before = message
    return messages
