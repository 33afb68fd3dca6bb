"""fusion_loss against hand-computed cases, a float64 loop oracle and gradcheck."""

import math

import pytest
import torch

from fusechat_fuse.training import loss as loss_module
from fusechat_fuse.training.loss import fusion_loss, row_sums, weighted_loss
from tests.helpers.reference_loss import reference_loss


def random_case(seed=0, B=3, T=5, V=11, K=4, mass=0.8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=g, dtype=dtype) * 3
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[torch.rand(B, T, generator=g) < 0.4] = -100
    ids = torch.stack([torch.randperm(V, generator=g)[:K] for _ in range(B * T)]).view(B, T, K)
    probs = torch.rand(B, T, K, generator=g, dtype=dtype)
    probs = mass * probs / probs.sum(-1, keepdim=True)
    drop = torch.rand(B, T, K, generator=g) < 0.25  # ragged rows: padding anywhere
    return logits, labels, ids.masked_fill(drop, -1), probs.masked_fill(drop, 0)


def test_hand_computed_case():
    logits = torch.tensor([[[0.0, math.log(3.0)]]], dtype=torch.float64)  # softmax = 1/4, 3/4
    out = fusion_loss(
        logits, torch.tensor([[1]]), torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.5]]]), lm_loss_weight=0.9
    )
    assert out.lm_loss.item() == pytest.approx(math.log(4 / 3))
    assert out.fusion_loss.item() == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(4 / 3))
    assert out.loss.item() == pytest.approx(0.9 * out.lm_loss.item() + 0.1 * out.fusion_loss.item())
    kl = fusion_loss(logits, torch.tensor([[1]]), torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.5]]]), kind="kl")
    assert kl.fusion_loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("mass", [1.0, 0.7])
def test_loss_and_gradient_equal_the_oracle(kind, weight, mass):
    logits, labels, ids, probs = random_case(mass=mass)
    logits.requires_grad_()
    out = fusion_loss(logits, labels, ids, probs, lm_loss_weight=weight, kind=kind)
    out.loss.backward()
    loss, lm, fusion, gradient = reference_loss(
        logits.tolist(), labels.tolist(), ids.tolist(), probs.tolist(), weight, kind
    )
    assert out.loss.item() == pytest.approx(loss, abs=1e-12)
    assert out.lm_loss.item() == pytest.approx(lm, abs=1e-12)
    assert out.fusion_loss.item() == pytest.approx(fusion, abs=1e-12)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=torch.float64), atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_gradcheck(kind):
    logits, labels, ids, probs = random_case(seed=3, B=2, T=3, V=7, K=3)
    logits.requires_grad_()

    def function(z):
        return tuple(fusion_loss(z, labels, ids, probs, lm_loss_weight=0.6, kind=kind))

    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("budget", [1, 25, 1 << 22])
def test_chunks_do_not_change_the_result(monkeypatch, budget):
    logits, labels, ids, probs = random_case(seed=4)
    whole = logits.clone().requires_grad_()
    fusion_loss(whole, labels, ids, probs).loss.backward()
    monkeypatch.setitem(loss_module._ROW_BUDGET, "cpu", budget)
    parts = logits.clone().requires_grad_()
    fusion_loss(parts, labels, ids, probs).loss.backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_float32_for_any_logits_dtype(dtype):
    logits, labels, ids, probs = random_case(seed=5, V=300, dtype=torch.float32)
    low = logits.to(dtype).requires_grad_()
    gold = low.detach().double()
    out = fusion_loss(low, labels, ids, probs, lm_loss_weight=0.9)
    out.loss.backward()
    expected, *_, gradient = reference_loss(gold.tolist(), labels.tolist(), ids.tolist(), probs.tolist(), 0.9, "ce")
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)  # no loss of precision beyond the logits' own rounding
    assert low.grad.dtype == dtype
    error = (low.grad.double() - torch.tensor(gradient, dtype=torch.float64)).abs().max()
    assert error <= torch.finfo(dtype).eps * 0.2 + 1e-7


def test_sparse_with_k_equal_v_is_dense_cross_entropy():
    logits, labels, *_ = random_case(seed=6)
    ids = torch.arange(11).expand(3, 5, 11)
    q = torch.softmax(torch.randn(3, 5, 11, dtype=torch.float64), -1)
    got = fusion_loss(logits, labels, ids, q, lm_loss_weight=0.0).loss
    keep = labels != -100
    expected = -(q * torch.log_softmax(logits, -1)).sum(-1)[keep].mean()
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)


def test_equal_distributions_have_zero_divergence():
    logits, labels, *_ = random_case(seed=7)
    ids = torch.arange(11).expand(3, 5, 11)
    logits.requires_grad_()
    out = fusion_loss(logits, labels, ids, torch.softmax(logits, -1).detach(), lm_loss_weight=0.0, kind="kl")
    out.loss.backward()
    assert abs(out.loss.item()) < 1e-14
    assert logits.grad.abs().max() < 1e-16


def test_nothing_labelled_is_zero_with_a_zero_gradient():
    logits, labels, ids, probs = random_case(seed=8)
    logits.requires_grad_()
    out = fusion_loss(logits, torch.full_like(labels, -100), ids, probs)
    out.loss.backward()
    assert out.loss.item() == 0
    assert logits.grad.shape == logits.shape
    assert not logits.grad.any()


def test_padding_and_empty_rows_carry_no_weight():
    logits, labels, ids, probs = random_case(seed=9)
    wide_ids = torch.cat([ids, torch.full((3, 5, 6), -1)], -1)
    wide = torch.cat([probs, torch.zeros(3, 5, 6, dtype=probs.dtype)], -1)
    assert fusion_loss(logits, labels, wide_ids, wide).loss == fusion_loss(logits, labels, ids, probs).loss
    none = fusion_loss(logits, labels, ids[..., :0], probs[..., :0], lm_loss_weight=0.9)
    assert none.fusion_loss.item() == 0
    assert none.loss.item() == pytest.approx(0.9 * none.lm_loss.item())


def test_num_items_makes_parts_add_up_to_the_whole():
    logits, labels, ids, probs = random_case(seed=10, B=8)
    whole = fusion_loss(logits, labels, ids, probs)
    count = int((labels != -100).sum())
    parts = [
        fusion_loss(logits[i : i + 1], labels[i : i + 1], ids[i : i + 1], probs[i : i + 1], num_items=count)
        for i in range(8)
    ]
    for name in ("loss", "lm_loss", "fusion_loss"):
        assert sum(getattr(p, name).item() for p in parts) == pytest.approx(getattr(whole, name).item(), rel=1e-12)
    as_tensor = fusion_loss(logits, labels, ids, probs, num_items=torch.tensor(count))
    assert as_tensor.loss == whole.loss


@pytest.mark.parametrize(
    ("weight", "lm", "fusion", "expected"),
    [(1.0, 2.0, math.inf, 2.0), (0.0, math.inf, 3.0, 3.0), (0.25, 2.0, 4.0, 3.5), (0.5, 2.0, math.inf, math.inf)],
)
def test_a_term_of_weight_zero_is_left_out(weight, lm, fusion, expected):
    assert weighted_loss(lm, fusion, weight) == expected
    assert weighted_loss(torch.tensor(lm), torch.tensor(fusion), weight).item() == expected


def test_masked_vocabulary_entries_outside_the_distribution_are_harmless():
    logits, labels, ids, probs = random_case(seed=11)
    expected = fusion_loss(logits, labels, ids, probs).loss.item()
    logits = torch.cat([torch.full((3, 5, 2), -torch.inf, dtype=logits.dtype), logits], -1).requires_grad_()
    labels, ids = labels + 2 * (labels >= 0), ids + 2 * (ids >= 0)  # padding stays, and is looked up at entry 0
    out = fusion_loss(logits, labels, ids, probs)
    out.loss.backward()
    assert out.loss.item() == expected
    assert torch.isfinite(out.loss)
    assert torch.isfinite(logits.grad).all()


def test_non_contiguous_logits():
    logits, labels, ids, probs = random_case(seed=12)
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not strided.is_contiguous()
    out = fusion_loss(strided, labels, ids, probs)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(fusion_loss(logits, labels, ids, probs).loss.item(), rel=1e-14)


def test_row_sums_takes_all_rows_when_none_are_named():
    logits, labels, ids, probs = random_case(seed=13)
    keep = (labels != -100).view(-1)
    args = labels.view(-1)[keep], ids.flatten(0, 1)[keep], probs.flatten(0, 1)[keep]
    a = logits.flatten(0, 1)[keep].clone().requires_grad_()
    b = logits.flatten(0, 1).clone().requires_grad_()
    sums_a, sums_b = row_sums(a, *args, "kl"), row_sums(b, *args, "kl", keep.nonzero()[:, 0])
    (sums_a[0] + 2 * sums_a[1]).backward()
    (sums_b[0] + 2 * sums_b[1]).backward()
    torch.testing.assert_close(a.grad, b.grad[keep])
    assert sums_a[0] == sums_b[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "jsd"}, "fusion loss type: expected one of"),
        ({"lm_loss_weight": 1.5}, r"lm_loss_weight: expected \[0, 1\], got 1.5"),
        ({"labels": torch.zeros(3, 4, dtype=torch.long)}, "shape for labels"),
        ({"target_ids": torch.zeros(3, 5, 2, dtype=torch.long)}, "shape for target_ids and target_probs"),
        ({"target_ids": torch.full((3, 5, 4), 11)}, "ids for target_ids: expected -1 to 10, got 11"),
        ({"labels": torch.full((3, 5), 12)}, "ids for labels: expected 0 to 10, got 12"),
    ],
)
def test_bad_input_is_named(change, message):
    logits, labels, ids, probs = random_case()
    arguments = {"labels": labels, "target_ids": ids, "target_probs": probs, **change}
    with pytest.raises(ValueError, match=message):
        fusion_loss(logits, **arguments)
