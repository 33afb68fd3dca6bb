"""Alignment in plain loops and float64, written from the method's text; shares no code with the library.

A token is a dict: id, message, start, end (bytes of the message's content); a source token also has P (probability of
the actual token) and others {id: P} of the kept candidates that are not the actual one.
"""

from __future__ import annotations

import math
from itertools import pairwise


def covering(p: dict, source: list[dict]) -> int | None:
    """Index of the source token that covers the start of pivot token p."""
    for n, q in enumerate(source):
        if q["message"] == p["message"] and q["start"] <= p["start"] < q["end"]:
            return n
    return None


def prefix(pivot, source, texts, path, pivot_bytes, source_bytes, pivot_end_of_turn, source_end_of_turn):
    """For each pivot token: None, or (kind, {pivot id: probability}).

    Args:
        pivot, source: lists of tokens in order.
        texts: message number -> bytes of its content.
        path: bytes -> list of pivot ids that spell them in mid-text.
        pivot_bytes, source_bytes: id -> bytes in mid-text, None for special tokens.
    """
    answers = []
    for index, p in enumerate(pivot):
        answers.append(None)
        n = covering(p, source)
        if n is None:
            continue
        q = source[n]
        text = texts[p["message"]]
        starts = [
            i for i, t in enumerate(pivot) if t["message"] == p["message"] and q["start"] <= t["start"] < q["end"]
        ]
        first = starts[0]
        if any(pivot[i]["end"] != pivot[i + 1]["start"] for i in range(first, index)):
            continue
        straddles = [t for t in pivot if t["message"] == q["message"] and t["start"] < q["start"] < t["end"] < q["end"]]
        if straddles and straddles[0]["end"] != pivot[first]["start"]:
            continue
        header = header_bytes(q, text, source_bytes)
        r = header + text[q["start"] : pivot[first]["start"]]
        put = header_bytes(pivot[first], text, pivot_bytes) if pivot[first]["start"] == q["start"] else b""
        done = [t["id"] for t in pivot[first:index]]
        alive = {}
        for i, probability in q["others"].items():
            spelled = candidate_path(i, r, put, header, path, source_bytes, pivot_end_of_turn, source_end_of_turn)
            if spelled is not None and spelled[: len(done)] == done:
                alive[i] = (probability, spelled[len(done)] if len(spelled) > len(done) else None)
        kept = sum(probability for probability, _ in alive.values()) + q["P"]
        D = 1.0 if p["start"] == q["start"] else kept
        row = {}
        for probability, following in alive.values():
            if following is not None and following != p["id"]:
                row[following] = row.get(following, 0.0) + probability / D
        if p["end"] < q["end"]:
            here = q["P"] + sum(probability for probability, following in alive.values() if following == p["id"])
            own = here / D
        else:
            own = q["P"] / D
            reached, m = q["end"], n
            while reached < p["end"]:
                m += 1
                if m >= len(source) or source[m]["message"] != p["message"] or source[m]["start"] != reached:
                    own = None
                    break
                if source[m]["end"] <= p["end"]:
                    own *= source[m]["P"]
                else:
                    part = header_bytes(source[m], text, source_bytes) + text[reached : p["end"]]
                    own *= source[m]["P"] + sum(
                        probability
                        for i, probability in source[m]["others"].items()
                        if source_bytes[i] is not None and source_bytes[i].startswith(part)
                    )
                reached = source[m]["end"]
        if own is None or own <= 0:
            continue
        row[p["id"]] = own
        answers[-1] = ("exact" if p["start"] == q["start"] else "inside", row)
    return answers


def header_bytes(token, text, spelled) -> bytes:
    """Bytes a token's entry has before its start: a chat header's, or a '▁' that stands for nothing."""
    own = spelled[token["id"]]
    return b"" if own is None else own[: max(len(own) - (token["end"] - token["start"]), 0)]


def candidate_path(i, r, put, header, path, source_bytes, pivot_end_of_turn, source_end_of_turn):
    """Pivot ids of candidate i read from after r, which begins with the header bytes; None if it does not begin with r.

    Special tokens have no header bytes: they are what they are by their role.
    """
    if i == source_end_of_turn:
        return [pivot_end_of_turn] if r == header else None
    spelled = source_bytes[i] if i < len(source_bytes) else None
    if spelled is None:
        return [] if r == header else None
    return path(put + spelled[len(r) :]) if spelled.startswith(r) else None


def single(pivot, source, texts, mapping, by_bytes, pivot_bytes, source_bytes) -> list:
    """The paper's mappings: for each pivot token (answered, {pivot id: probability}, mapped mass).

    Where the tokens also hold different header bytes, a candidate counts if it begins with the source's and a pivot
    token has the pivot's header bytes and the candidate's rest.
    """
    answers = []
    for p in pivot:
        n = covering(p, source)
        row, mass = {}, 0.0
        if n is not None and source[n]["start"] == p["start"]:
            read = header_bytes(source[n], texts[p["message"]], source_bytes)
            put = header_bytes(p, texts[p["message"]], pivot_bytes)
            for i, probability in source[n]["kept"].items():
                target = mapping[i]
                spelled = source_bytes[i]
                if read != put and spelled is not None:
                    target = by_bytes.get(put + spelled[len(read) :], -1) if spelled.startswith(read) else -1
                if target >= 0:
                    row[target] = row.get(target, 0.0) + probability
                    mass += probability
        if mass > 0:
            answers.append((True, {i: probability / mass for i, probability in row.items()}, mass))
        else:
            answers.append((False, {p["id"]: 1.0}, 0.0))
    return answers


def gap(pivot, source, probability) -> tuple[float, float, int]:
    """(source bits, aligned bits, bytes) over covered stretches; probability[i] of pivot token i or None."""
    bits = [0.0, 0.0, 0]
    borders = []
    for i, p in enumerate(pivot):
        for j, q in enumerate(source):
            if (p["message"], p["start"]) == (q["message"], q["start"]):
                borders.append((i, j))
    for number, (i, j) in enumerate(borders):
        after_i, after_j = borders[number + 1] if number + 1 < len(borders) else (len(pivot), len(source))
        ps, qs = pivot[i:after_i], source[j:after_j]
        whole = all(a["message"] == b["message"] and a["end"] == b["start"] for t in (ps, qs) for a, b in pairwise(t))
        if not whole or ps[-1]["end"] != qs[-1]["end"] or any(x is None for x in probability[i:after_i]):
            continue
        bits[0] -= sum(math.log2(q["P"]) for q in qs)
        bits[1] -= sum(math.log2(x) for x in probability[i:after_i])
        bits[2] += sum(p["end"] - p["start"] for p in ps)
    return tuple(bits)


def levenshtein(a: str, b: str) -> int:
    """Edit distance by the textbook table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[len(b)]
