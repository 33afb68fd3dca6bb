"""One aligned conversation with both tokenizations, as plain data, for `inspect` in the terminal and as a page.

An aligned directory holds the pivot's tokens only; the source's tokens are read from the representation that was
aligned, whose path is in the manifest, and aligned again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from fusechat_fuse.alignment.candidate_outcomes import Outcome
from fusechat_fuse.alignment.candidates import Stream
from fusechat_fuse.alignment.certificate import certificate, kept_mass, tally
from fusechat_fuse.alignment.correspondence import EXACT, INSIDE, message_of
from fusechat_fuse.alignment.mappings import MAPPINGS
from fusechat_fuse.alignment.run import origin
from fusechat_fuse.alignment.sparse_rows import Mapped
from fusechat_fuse.alignment.streams import Batch, align_batch, make_batch
from fusechat_fuse.alignment.tokenizer_pair import Side, TokenizerPair, load_counts
from fusechat_fuse.errors import InputError
from fusechat_fuse.store.cross_entropy import pivot_cross_entropy
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
        id, mapping, models; messages: per answer the text `before` it and its `stretches` {pivot, source} (numbers of
        tokens over the same text); tokens: see `_pivot_tokens`; source_tokens: text, ce, and the text `before` it that
        belongs to the chat template; figures: the certificate of this conversation and of the whole data. Without the
        source's representation (`required=False`) messages is None and the tokens hold what is stored.
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
    pivot_tokens = _pivot_tokens(row, batch, mapped, outcomes, pair)
    source_name = names_of(pair.source)
    source_tokens = [
        {
            "text": _own_text(pair.source, batch.source, q, source_name),
            "before": readable((pair.source.bytes[batch.source.ids[q]] or b"")[: int(batch.source.header[q])]),
            "ce": float(ce),
        }
        for q, ce in enumerate(batch.source.ce)
    ]
    here = certificate({name: float(counts[0]) for name, counts in tally(batch, mapped).items()})
    here["pivot_bits_per_byte"] = pivot_cross_entropy(row, "byte") / float(np.log(2))
    return view | {
        "figures": {"conversation": here, "data": manifest["certificate"]["all"]},
        "messages": _messages(row, batch, pair.pivot, pivot_tokens, source_tokens),
        "tokens": pivot_tokens,
        "source_tokens": source_tokens,
    }


def _pivot_tokens(
    row: dict, batch: Batch, mapped: Mapped, outcomes: list[list[Outcome]], pair: TokenizerPair
) -> list[dict]:
    """The pivot's tokens: text, class, safe, mass, unmapped (mass of candidates that became no token), kept (mass that
    the source kept), answer (number of a source token), candidates, the mapped row, and what `_compared` says
    of it and of the pivot's own prediction."""
    source, pivot_name, source_name = batch.source, names_of(pair.pivot), names_of(pair.source)
    own_ids, own_logprobs, own_ce = (row[name][batch.kept] for name in ("topk_ids", "topk_logprobs", "ce"))
    kept = kept_mass(source, batch.match, mapped)
    tokens = []
    for p, q in enumerate(batch.match.source.tolist()):
        actual = int(batch.pivot.ids[p])
        candidates = [
            {
                "token": source_name(int(source.topk_ids[q, k])),
                "p": float(np.exp(np.float64(source.topk_logprobs[q, k]))),
                "became": pivot_name(i) if i >= 0 else "",
                "why": why,
                "actual": bool(source.topk_ids[q, k] == source.ids[q]),
            }
            for k, (i, why) in enumerate(outcomes[p])
            if source.topk_ids[q, k] >= 0
        ]
        own = {int(i): float(np.exp(np.float64(lp))) for i, lp in zip(own_ids[p], own_logprobs[p]) if i >= 0}
        own.setdefault(actual, float(np.exp(-np.float64(own_ce[p]))))
        given = {int(i): float(v) for i, v in zip(mapped.ids[p], mapped.probs[p]) if i >= 0}
        tokens.append(
            {
                "text": _own_text(pair.pivot, batch.pivot, p, pivot_name),
                "class": CLASSES.get(int(mapped.kind[p]), "none"),
                "safe": bool(batch.safe[p]),
                "mass": float(mapped.mass[p]),
                "unmapped": sum(c["p"] for c in candidates if not c["became"]),
                "kept": float(kept[p]),
                "answer": q,
                "candidates": candidates,
                "row": _row(mapped.ids[p], mapped.probs[p], pivot_name),
                **_compared(given, own, pivot_name, bool(mapped.answered[p])),
            }
        )
    return tokens


def _compared(given: dict[int, float], own: dict[int, float], name: Names, answered: bool) -> dict:
    """What the source gives beside what the pivot predicts itself.

    Returns:
        compared: (name, P given, P of the pivot; None: not kept) of every token that either has, most likely first;
        rests: 1 - the sum of each; disagreement: 1 - sum_i min(given_i, own_i) - min(rests), the share of probability
        that the two place differently, in [0, 1]; None without an answer.
    """
    ids = sorted({*given, *own}, key=lambda i: (-given.get(i, 0.0), -own.get(i, 0.0)))
    rests = [max(0.0, 1 - sum(side.values())) for side in (given, own)]
    shared = sum(min(given[i], own[i]) for i in given.keys() & own.keys()) + min(rests)
    return {
        "compared": [(name(i), given.get(i), own.get(i)) for i in ids],
        "rests": rests,
        "disagreement": min(1.0, max(0.0, 1 - shared)) if answered else None,
    }


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


def _messages(row: dict, batch: Batch, pivot: Side, pivot_tokens, source_tokens) -> list[dict]:
    """Tokens grouped by message, then into stretches from one common start to the next; the text before each message
    is what lies between its first predicted token and the last of the message before."""
    common = set(batch.pivot.start[batch.match.kind == EXACT].tolist())
    sides = (("pivot", batch.pivot, pivot_tokens), ("source", batch.source, source_tokens))
    items = sorted((int(stream.start[n]), side, n) for side, stream, tokens in sides for n in range(len(tokens)))
    messages: list[dict] = []
    last = None
    for place, side, n in items:
        message = int(message_of(place))
        if message != last:
            messages.append({"before": _text_before(row, message, pivot), "stretches": []})
        stretches = messages[-1]["stretches"]
        if message != last or (place in common and stretches[-1]["at"] != place):
            stretches.append({"at": place, "pivot": [], "source": []})
        stretches[-1][side].append(n)
        last = message
    return messages


def _text_before(row: dict, message: int, side: Side) -> str:
    """What the model reads between an answer and the one before: prompts, and the text of the chat template."""
    own = np.flatnonzero(row["message"] == message)
    if not len(own):
        return ""
    first = int(row["predicted"][own[0]])
    begin = int(row["predicted"][own[0] - 1]) + 1 if own[0] else 0
    pieces = [side.bytes[i] or (side.pieces[i] or "").encode() for i in row["input_ids"][begin:first].tolist()]
    return b"".join(pieces).decode("utf-8", "replace")
