"""The fusion loss from hidden states on, forward and backward, beside plain and fused losses on the same GPU.

    python -m tests.benchmarks.gpu.bench_loss [--save FOLDER]

Ways: plain (all logits, float32 cross-entropy), dense (the same, and a [N, V] teacher distribution in bfloat16 made
from the top 10, as dense distillation keeps it), cce and liger (fused linear cross-entropy: the language-model loss
alone, so the price of fusion shows) and ours (language-model and fusion loss). bfloat16 weights, hidden size 4096,
gradients of hidden states and weight included. Peak: beyond the inputs. Ours is checked against plain autograd in
float32 in the same run.
"""

import argparse

import torch
from torch.nn import functional as F

from fusechat_fuse.models.logit_transform import LogitTransform
from fusechat_fuse.training.head_loss import LabelledRows
from fusechat_fuse.training.loss import fusion_loss
from tests.benchmarks.gpu import card

K, WEIGHT = 10, 0.9


def inputs(N: int, V: int, D: int) -> dict:
    device, seed = card.device(), torch.Generator(card.device()).manual_seed(0)
    random = lambda *shape: torch.randn(*shape, device=device, generator=seed, dtype=torch.bfloat16)  # noqa: E731
    ids = torch.randint(V, (N, K), device=device, generator=seed)
    probs = torch.softmax(torch.randn(N, K, device=device, generator=seed), 1) * 0.95
    return {
        "hidden": random(N, D).requires_grad_(),
        "weight": random(V, D).mul_(0.02).requires_grad_(),
        "labels": torch.randint(V, (N,), device=device, generator=seed),
        "ids": ids,
        "probs": probs,
    }


def plain(hidden, weight, labels, **_):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def dense(hidden, weight, labels, ids, probs):
    teacher = torch.zeros(len(labels), len(weight), dtype=torch.bfloat16, device=hidden.device)
    teacher.scatter_add_(1, ids, probs.bfloat16())
    logits = F.linear(hidden, weight).float()
    lm = F.cross_entropy(logits, labels, reduction="sum")
    return WEIGHT * lm - (1 - WEIGHT) * (teacher * torch.log_softmax(logits, -1)).sum()


def ours(hidden, weight, labels, ids, probs):
    rows = LabelledRows(labels, ids, probs, WEIGHT, "ce", LogitTransform())
    return rows.losses(hidden, weight, None)[0]


def cce(hidden, weight, labels, **_):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, reduction="sum")


def liger(hidden, weight, labels, **_):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)


WAYS = {"plain": plain, "dense": dense, "cce": cce, "liger": liger, "ours": ours}


def check(V: int, D: int) -> float:
    """Relative error of our gradients against autograd in float32, the larger of both."""
    given = inputs(512 if card.device().type == "cuda" else 64, V, D)
    ours(**given).backward()
    found = [given[name].grad.double() for name in ("hidden", "weight")]
    exact = [given[name].detach().float().requires_grad_() for name in ("hidden", "weight")]
    logits = (exact[0] @ exact[1].t())[None]
    shifted = given["labels"][None], given["ids"][None], given["probs"][None]
    fusion_loss(logits, *shifted, lm_loss_weight=WEIGHT, num_items=1).loss.backward()
    return max(float((a - b.grad).norm() / b.grad.norm()) for a, b in zip(found, exact))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", metavar="FOLDER")
    options = parser.parse_args()
    on_gpu = card.device().type == "cuda"
    sizes = [(V, N) for V in (32_000, 128_256, 151_936) for N in (2048, 8192, 32_768)] if on_gpu else [(500, 64)]
    hidden_size = 4096 if on_gpu else 64
    ways = WAYS if on_gpu else {name: WAYS[name] for name in ("plain", "dense", "ours")}
    lines = []
    print(f"{card.describe()}\n     V     N  way        ms  of plain  peak GiB  error")
    for V, N in sizes:
        error, of_plain = check(V, hidden_size), None
        if error > 2e-2:
            raise AssertionError(f"gradients at V = {V}: {error:.1e} off")
        for way, loss in ways.items():
            given = inputs(N, V, hidden_size)

            def forget(given=given):
                given["hidden"].grad = given["weight"].grad = None

            found = card.measure(lambda loss=loss, given=given: loss(**given).backward(), turns=3, forget=forget)
            del given, forget
            of_plain = found["seconds"] if way == "plain" else of_plain
            ratio = found["seconds"] / of_plain if found["seconds"] and of_plain else None
            line = {"V": V, "N": N, "way": way, **found, "of_plain": ratio}
            lines.append({**line, "error": error} if way == "ours" else line)
            spent = card.cell(found["seconds"] and 1000 * found["seconds"], "8.1f")
            peak = card.cell(found["peak"] and found["peak"] / 2**30, "6.2f")
            shown = f"{error:.1e}" if way == "ours" else ""
            print(f"{V:6}{N:6}  {way:6}{spent:>8}{card.cell(ratio, '.2f'):>10}{peak:>10}  {shown}", flush=True)
    card.save("loss", lines, options.save)


if __name__ == "__main__":
    main()
