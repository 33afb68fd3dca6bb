"""Against recorded values of the released trainer, and a test for each place where we differ on purpose.

The recorded file holds inputs of the released collator (top-10 logits of both models per position, CE per
conversation), its dense bfloat16 distributions and the losses of its trainer. Where its distributions are fed in, our
loss is its loss; where it rounds (distributions and CE to bfloat16), ours follows the exact numbers.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fusechat_fuse.training.choice import fusion_distribution
from fusechat_fuse.training.collator import FusionCollator
from fusechat_fuse.training.loss import fusion_loss

GOLDEN = Path(__file__).parent / "golden"
ARRAYS = np.load(GOLDEN / "fusion_loss.npz")
RECORD = json.loads((GOLDEN / "fusion_loss.json").read_text())
CASES = list(RECORD["cases"])
V = RECORD["V"]


def entries(**wanted):
    return [e for e in RECORD["losses"] if all(e[key] == value for key, value in wanted.items())]


def shifted_labels(case):
    labels = torch.from_numpy(ARRAYS[f"{case}__c_labels"])
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def released_distribution(entry):
    """The dense distribution its trainer used, as ids and probabilities over the whole vocabulary."""
    case, T = entry["case"], f"T{entry['temperature']:.0f}"
    base, fused = (torch.from_numpy(ARRAYS[f"{case}__{T}__{which}_target_dist"]) for which in ("base", "fused"))
    chosen = torch.tensor(RECORD["cases"][case]["chosen"]) if entry["fuse_with_ref_model"] else torch.ones(3)
    probs = torch.where(chosen[:, None, None] == 1, fused, base)
    return torch.arange(V).expand(probs.shape), probs


def our_loss(entry, ids, probs, dtype=torch.float32):
    logits = torch.from_numpy(ARRAYS[f"{entry['case']}__model_logits"]).to(dtype)
    if entry["logits_dtype"] == "bf16":
        logits = logits.to(torch.bfloat16)
    labels = shifted_labels(entry["case"])
    weight, kind = entry["lm_loss_weight"], entry["loss_type"]
    return fusion_loss(logits, labels, ids, probs, lm_loss_weight=weight, kind=kind).loss.item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "tolerance"), [("ce", 1e-6), ("kl", 3e-4)])
def test_its_distributions_give_its_loss(case, kind, tolerance):
    """For kl its float32 loss evaluates the entropy of the distribution in bfloat16 (1.6e-4); ours does not."""
    found = entries(case=case, loss_type=kind, logits_dtype="f32")
    assert len(found) == 16
    for entry in found:
        got = our_loss(entry, *released_distribution(entry))
        assert got == pytest.approx(entry["loss"], rel=tolerance, abs=1e-6)
        assert got == pytest.approx(entry["float64_restatement"], rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_bfloat16_logits_are_summed_in_float32(kind):
    """Released: the loss of bfloat16 logits is computed in bfloat16, up to 6e-3 off; ours is exact for these logits."""
    theirs, ours = [], []
    for entry in entries(loss_type=kind, logits_dtype="bf16"):
        ids, probs = released_distribution(entry)
        logits = torch.from_numpy(ARRAYS[f"{entry['case']}__model_logits"]).to(torch.bfloat16).double()
        exact = fusion_loss(
            logits, shifted_labels(entry["case"]), ids, probs, lm_loss_weight=entry["lm_loss_weight"], kind=kind
        ).loss.item()
        theirs.append(abs(entry["loss"] - exact))
        ours.append(abs(our_loss(entry, ids, probs) - exact))
    assert max(theirs) > 1e-3
    assert max(ours) < 1e-5


def split(case, name):
    """Ragged rows of all conversations -> per conversation a list of rows."""
    lengths, flat = ARRAYS[f"{case}__{name}__len"], ARRAYS[f"{case}__{name}__flat"]
    rows = np.split(flat, np.cumsum(lengths)[:-1])
    return [
        rows[a:b] for a, b in zip(*(lambda ends: (np.append(0, ends[:-1]), ends))(np.cumsum(ARRAYS[f"{case}__nrows"])))
    ]


def flat(case, name):
    return np.split(ARRAYS[f"{case}__{name}__flat"], np.cumsum(ARRAYS[f"{case}__n"])[:-1])


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def aligned(case, empty_as_pivot=False):
    """The released collator's inputs as rows of ours: row t - 1 of its tables predicts token t."""
    tables = {name: split(case, name) for name in ("per_step_indices", "per_step_logits")}
    tables |= {f"fused_{name}": split(case, f"fused_{name}") for name in tables}
    rows = []
    for b, (ids, labels) in enumerate(zip(flat(case, "input_ids"), flat(case, "labels"))):
        stored = len(tables["per_step_indices"][b])
        predicted = np.array([t for t in range(1, len(ids)) if labels[t] != -100 and t - 1 < stored], np.int32)
        width = 10
        source_ids, source_probs = np.full((len(predicted), width), -1, np.int32), np.zeros((len(predicted), width))
        for p, t in enumerate(predicted):
            which = "" if empty_as_pivot and not len(tables["fused_per_step_indices"][b][t - 1]) else "fused_"
            row = tables[f"{which}per_step_indices"][b][t - 1]
            if len(row):
                source_ids[p, : len(row)] = row
                source_probs[p, : len(row)] = np.exp(log_softmax(tables[f"{which}per_step_logits"][b][t - 1]))
        pivot_ce = ARRAYS[f"{case}__metric_ce"][b]
        rows.append(
            {
                "id": f"{case}-{b}",
                "input_ids": ids.astype(np.int32),
                "predicted": predicted,
                "topk_ids": np.array([tables["per_step_indices"][b][t - 1] for t in predicted], np.int32),
                "topk_logprobs": np.array([log_softmax(tables["per_step_logits"][b][t - 1]) for t in predicted]),
                "ce": np.full(len(predicted), pivot_ce),
                "source_ids": source_ids,
                "source_probs": source_probs.astype(np.float32),
                "source_ce": float(ARRAYS[f"{case}__fused_metric_ce"][b]),
            }
        )
    return rows


def dense(batch):
    full = torch.zeros(*batch["target_ids"].shape[:2], V)
    return full.scatter_add_(2, batch["target_ids"].clamp(min=0), batch["target_probs"])


def exact_distribution(case, b, t, which, temperature):
    prefix = "" if which == "base" else "fused_"
    ids = split(case, f"{prefix}per_step_indices")[b][t]
    q = np.zeros(V)
    if not len(ids):
        return q
    np.add.at(q, ids, np.exp(log_softmax(np.asarray(split(case, f"{prefix}per_step_logits")[b][t]) / temperature)))
    return q


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_our_distributions_are_its_without_rounding(case, temperature):
    """Released: top-k logits and probabilities are rounded to bfloat16; ours are the softmax of the logits given."""
    rows = aligned(case)
    collate = FusionCollator(
        preset="paper", fuse_temperature=temperature, fusion_function="source", pad_to_multiple_of=16
    )
    batch = collate(rows)
    got = dense(batch)
    theirs = torch.from_numpy(ARRAYS[f"{case}__T{temperature:.0f}__fused_target_dist"])
    labelled = batch["shift_labels"] != -100
    assert torch.equal(batch["shift_labels"], shifted_labels(case))
    assert labelled.any()
    worst = {"ours": 0.0, "theirs": 0.0}
    for b, t in labelled.nonzero().tolist():
        exact = exact_distribution(case, b, t, "fused", temperature)
        if not exact.any():  # no row: released, a copy of the pivot's; ours, no fusion at this position
            assert not got[b, t].any()
            assert theirs[b, t].any()
            continue
        worst["ours"] = max(worst["ours"], np.abs(got[b, t].numpy() - exact).max())
        worst["theirs"] = max(worst["theirs"], np.abs(theirs[b, t].numpy() - exact).max())
    assert worst["ours"] < 1e-6
    assert 1e-4 < worst["theirs"] < 0.05  # the same up to its rounding, which is not nothing


@pytest.mark.parametrize("case", CASES)
def test_the_choice_follows_exact_cross_entropy(case):
    """Released: CE is compared in bfloat16, so near values tie and the pivot wins; a CE above 89 ties as well."""
    told = RECORD["cases"][case]
    ours = [fusion_distribution(row).source_share for row in aligned(case)]
    assert ours == told["chosen_by_exact_ce"]
    assert (ours == told["chosen"]) == (case not in ("bf16_tie", "pre_padded"))


@pytest.mark.parametrize("case", ["mixed", "base_wins", "fused_wins"])
def test_from_rows_to_the_loss(case):
    """Where only its rounding of distributions enters, the whole way gives its loss within that rounding."""
    batch = FusionCollator(preset="paper", pad_to_multiple_of=16)(aligned(case, empty_as_pivot=True))
    for entry in entries(case=case, temperature=1.0, logits_dtype="f32", fuse_with_ref_model=True, loss_type="ce"):
        assert our_loss(entry, batch["target_ids"], batch["target_probs"]) == pytest.approx(entry["loss"], rel=5e-3)


def test_a_batch_without_labels_is_zero_not_nan():
    """Released: a mean over nothing, 0/0."""
    logits = torch.from_numpy(ARRAYS["mixed__model_logits"])
    ids, probs = released_distribution(entries(case="mixed")[0])
    assert fusion_loss(logits, torch.full((3, 16), -100), ids, probs).loss.item() == 0


def test_rows_are_borrowed():
    """Released: the collator deletes keys of the caller's rows and pads their labels in place."""
    rows = aligned("mixed")
    before = [{key: np.copy(value) for key, value in row.items()} for row in rows]
    FusionCollator(preset="paper", max_length=7)(rows)
    for row, copy in zip(rows, before):
        assert row.keys() == copy.keys()
        assert all(np.array_equal(row[key], copy[key]) for key in row)


def test_distributions_stay_sparse():
    """Released: two dense [B, T, V] tensors per batch."""
    batch = FusionCollator(preset="paper")(aligned("mixed"))
    assert batch["target_ids"].shape[2] == 10 < V
