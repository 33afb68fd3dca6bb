"""The fusion loss written from its equations: float64 loops over dense distributions, no code of the library."""

import math


def softmax(z):
    top = max(z)
    e = [math.exp(x - top) for x in z]
    total = sum(e)
    return [x / total for x in e]


def dense_distribution(ids, probs, vocab_size):
    """A list over the vocabulary; entries of one id add up, -1 is padding."""
    q = [0.0] * vocab_size
    for u, p in zip(ids, probs):
        if u >= 0:
            q[u] += p
    return q


def reference_loss(logits, labels, ids, probs, weight, kind, num_items=None):
    """logits [B][T][V], labels [B][T] (shifted, -100 ignored), ids/probs [B][T][K] -> (loss, lm, fusion, gradient)."""
    lm_sum = fusion_sum = 0.0
    count = sum(y != -100 for row in labels for y in row)
    n = num_items if num_items is not None else max(count, 1)
    gradient = [[[0.0] * len(z) for z in row] for row in logits]
    for b, row in enumerate(logits):
        for t, z in enumerate(row):
            y = labels[b][t]
            if y == -100:
                continue
            p = softmax(z)
            q = dense_distribution(ids[b][t], probs[b][t], len(z))
            lm_sum += -math.log(p[y])
            for v in range(len(z)):
                if q[v] > 0:
                    fusion_sum += -q[v] * math.log(p[v]) + (q[v] * math.log(q[v]) if kind == "kl" else 0.0)
            mass = sum(q)
            for v in range(len(z)):
                d_lm = p[v] - (v == y)
                d_fusion = mass * p[v] - q[v]
                gradient[b][t][v] = (weight * d_lm + (1 - weight) * d_fusion) / n
    lm, fusion = lm_sum / n, fusion_sum / n
    return weight * lm + (1 - weight) * fusion, lm, fusion, gradient
