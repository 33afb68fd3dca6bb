"""Oracles for representations: loops in float64 and places found by other means than the library's."""

import math


def log_softmax(logits):
    """[V] numbers -> [V] natural log-probabilities, one sum at a time."""
    values = [float(z) for z in logits]
    highest = max(values)
    total = math.fsum(math.exp(z - highest) for z in values)
    return [z - highest - math.log(total) for z in values]


def distribution(logits, actual, k):
    """(k ids, their log-probabilities descending, -log-probability of `actual`) for one row of logits."""
    logprobs = log_softmax(logits)
    ids = sorted(range(len(logprobs)), key=lambda i: -logprobs[i])[:k]
    return ids, [logprobs[i] for i in ids], -logprobs[actual]


def spans_by_offsets(tokenizer, text, places):
    """[(token index, message, start, end)] of the tokens that touch ASCII contents, by the tokenizer's own offsets.

    `places` is [(message, begin, first character, last character)] of the contents in the text; what lies between
    `begin`, where the model takes over, and the content has an empty span at byte 0.
    """
    assert text.isascii()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        (t, message, max(a, first) - first, max(min(b, last), first) - first)
        for message, begin, first, last in places
        for t, (a, b) in enumerate(offsets)
        if a < last and (b > first or a >= begin)
    ]
