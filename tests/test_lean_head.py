"""The lean head gives the loss and the gradients of the plain path, for every family and every way through it."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import modeling_utils

from fusechat_fuse.training import head_loss, lean_head, loss
from fusechat_fuse.training.lean_head import install_lean_head, is_plain_linear, takes_kept_logits, why_not_lean
from fusechat_fuse.training.loss import fusion_loss
from tests.helpers.tiny_models import FAMILIES, batch_of, tiny_model

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
FUSION_COLUMNS = ("shift_labels", "target_ids", "target_probs")


def plain(model, batch, weight=0.9, kind="ce"):
    logits = model(**{k: batch[k] for k in MODEL_INPUTS if k in batch}).logits
    return fusion_loss(logits, *(batch[k] for k in FUSION_COLUMNS), lm_loss_weight=weight, kind=kind, num_items=1)


def lean(model, batch, weight=0.9, kind="ce"):
    inputs = {k: batch[k] for k in (*MODEL_INPUTS, *FUSION_COLUMNS) if k in batch}
    return model(**inputs, lm_loss_weight=weight, fusion_loss_type=kind)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch, tolerance, **options):
    expected = plain(model, batch, **options)
    gold = gradients(model, expected.loss)
    install_lean_head(model)
    got = lean(model, batch, **options)
    mine = gradients(model, got.loss)
    for a, b in zip((got.loss, got.lm_loss, got.fusion_loss), expected):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)
    assert mine.keys() == gold.keys()
    for name in gold:
        scale = gold[name].abs().max().item() + 1e-30
        assert (mine[name] - gold[name]).abs().max().item() <= tolerance * max(scale, 1.0), name


@pytest.fixture(params=["gradient in forward", "recomputed"])
def way(request, monkeypatch):
    if request.param == "recomputed":
        monkeypatch.setattr(lean_head, "is_plain_linear", lambda lm_head: False)
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_plain_path(family, way):
    model = tiny_model(family, dtype=torch.float64)
    assert why_not_lean(model) is None
    assert_same(model, batch_of(dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("family", ["Mistral", "Gemma2"])
def test_float32_within_rounding(family, way):
    assert_same(tiny_model(family), batch_of(), 3e-5)


@pytest.mark.parametrize(("weight", "kind"), [(0.0, "ce"), (1.0, "ce"), (0.5, "kl"), (0.0, "kl")])
def test_weights_and_kinds(weight, kind, way):
    assert_same(tiny_model(dtype=torch.float64), batch_of(dtype=torch.float64), 1e-10, weight=weight, kind=kind)


@pytest.mark.parametrize("budget", [50, 170, 1 << 20])
def test_chunks_of_any_size(budget, monkeypatch):
    monkeypatch.setitem(loss._ROW_BUDGET, "cpu", budget)
    monkeypatch.setattr(head_loss, "_LEAST_ROWS", 1)
    assert_same(tiny_model("Gemma2", dtype=torch.float64), batch_of(dtype=torch.float64), 1e-10)


def test_packed_rows_give_the_loss_of_padded_ones(way):
    model = tiny_model(dtype=torch.float64)
    install_lean_head(model)
    padded, packed = (batch_of(4, dtype=torch.float64, packing=p) for p in (False, True))
    assert packed["input_ids"].shape[0] == 1
    a, b = lean(model, padded), lean(model, packed)
    gold, mine = gradients(model, a.loss), gradients(model, b.loss)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-10, atol=1e-10)
    for name in gold:
        torch.testing.assert_close(mine[name], gold[name], rtol=1e-9, atol=1e-10)


def test_nothing_labelled_still_reaches_every_parameter(way):
    model = tiny_model()
    install_lean_head(model)
    batch = batch_of()
    batch["shift_labels"].fill_(-100)
    out = lean(model, batch)
    assert out.loss.item() == 0
    grads = gradients(model, out.loss)
    assert set(grads) == {name for name, _ in model.named_parameters()}
    assert not any(g.any() for g in grads.values())


@pytest.mark.parametrize(("hooked_first", "calls_forward", "calls_in_all"), [(False, 1, 1), (True, 8, 16)])
def test_lm_head_is_called_equally_often_whatever_the_labels(hooked_first, calls_forward, calls_in_all):
    """Sharded heads are gathered by hooks, which every process must run the same number of times."""
    model, calls = tiny_model(), []
    if hooked_first:  # the head of another: it is called as it is
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    install_lean_head(model)
    if not hooked_first:  # what FSDP and ZeRO-3 do afterwards
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    for labelled in (0, 1, 3, 1000):
        batch = batch_of(3)
        at = (batch["shift_labels"] != -100).nonzero()[labelled:]
        batch["shift_labels"][at[:, 0], at[:, 1]] = -100
        calls.clear()
        out = lean(model, batch)
        assert len(calls) == calls_forward
        out.loss.backward()
        assert len(calls) == calls_in_all


def test_a_copy_of_the_model_uses_its_own_weights():
    model, batch = tiny_model(), batch_of()
    install_lean_head(model)
    before = lean(model, batch).loss.item()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert lean(copied, batch).loss.item() == before
    assert torch.equal(copied(batch["input_ids"]).logits, tiny_model()(batch["input_ids"]).logits)


def test_without_fusion_columns_it_is_the_original_forward():
    model = tiny_model()
    batch = batch_of()
    before = model(input_ids=batch["input_ids"], labels=batch["labels"])
    generated = model.generate(batch["input_ids"][:1, :4], max_new_tokens=5, do_sample=False)
    signature = inspect.signature(model.forward)
    install_lean_head(model)
    install_lean_head(model)  # once is enough
    after = model(input_ids=batch["input_ids"], labels=batch["labels"])
    assert torch.equal(before.logits, after.logits)
    assert before.loss == after.loss
    assert torch.equal(generated, model.generate(batch["input_ids"][:1, :4], max_new_tokens=5, do_sample=False))
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == list(tiny_model().state_dict())


def test_no_logits_of_the_whole_sequence_exist(monkeypatch):
    """The largest tensor that the head makes has fewer rows than the sequence has labelled positions."""
    model = tiny_model(vocab_size=50)
    install_lean_head(model)
    monkeypatch.setattr(head_loss, "_LEAST_ROWS", 20)
    monkeypatch.setitem(loss._ROW_BUDGET, "cpu", 1)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == 50:
                    seen.append(tensor.numel() // 50)
            return out

    with Watch():
        batch = batch_of(8)
        lean(model, batch).loss.backward()
    assert max(seen) == 20
    assert (batch["shift_labels"] != -100).sum() > 30


def test_frozen_head_and_frozen_decoder():
    for frozen in ("lm_head", "model"):
        model = tiny_model(dtype=torch.float64)
        getattr(model, frozen).requires_grad_(False)
        assert_same(model, batch_of(dtype=torch.float64), 1e-10)


def test_bias_and_gradient_scale():
    model = tiny_model(dtype=torch.float64)
    model.lm_head = nn.Linear(16, 50, dtype=torch.float64)
    batch = batch_of(dtype=torch.float64)
    assert_same(model, batch, 1e-10)
    single, triple = gradients(model, lean(model, batch).loss), gradients(model, 3 * lean(model, batch).loss)
    for name in single:  # norms inside the decoder are float32 whatever the model's dtype
        assert (triple[name] - 3 * single[name]).abs().max() <= 1e-6 * single[name].abs().max()


def test_taking_the_gradient_twice_is_an_error_not_a_wrong_number():
    model = tiny_model()
    install_lean_head(model)
    out = lean(model, batch_of())
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient can be taken once"):
        out.loss.backward()


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_no_worse_than_the_plain_path(autocast, way):
    batch = batch_of(8)
    gold_model = tiny_model("Gemma2", dtype=torch.float64)
    gold = gradients(gold_model, plain(gold_model, batch).loss)
    model = tiny_model("Gemma2", dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        reference = plain(model, batch).loss
    theirs = gradients(model, reference)
    install_lean_head(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = lean(model, batch)
    mine = gradients(model, out.loss)
    assert out.loss.dtype == torch.float32
    for name in gold:
        scale = gold[name].norm()
        error, allowed = (mine[name] - gold[name]).norm() / scale, (theirs[name] - gold[name]).norm() / scale
        assert error <= 1.25 * allowed + 2e-3, name


def test_no_gradient_no_work():
    model = tiny_model()
    install_lean_head(model)
    with torch.no_grad():
        out = lean(model, batch_of())
    assert not out.loss.requires_grad
    assert out.loss.item() == pytest.approx(lean(model, batch_of()).loss.item())


def test_which_heads_are_plain():
    assert is_plain_linear(nn.Linear(3, 4))
    hooked = nn.Linear(3, 4)
    hooked.register_forward_pre_hook(lambda *_: None)
    assert not is_plain_linear(hooked)
    assert not is_plain_linear(nn.Sequential(nn.Linear(3, 4)))


def test_unknown_models_are_named_with_the_reason():
    class Own(type(tiny_model())):
        pass

    assert "Own is not among the families" in why_not_lean(Own(tiny_model().config))
    assert "output_router_logits" in why_not_lean(tiny_model("Mixtral", output_router_logits=True))
    assert takes_kept_logits(tiny_model()) == hasattr(modeling_utils, "slice_logits_to_keep")  # from 5.21 on
    assert not takes_kept_logits(nn.Linear(2, 2))


def test_ids_beyond_the_head_are_named():
    model = tiny_model()
    install_lean_head(model)
    batch = batch_of()
    batch["target_ids"][0, (batch["shift_labels"][0] != -100).nonzero()[0, 0], 0] = 50
    with pytest.raises(ValueError, match="ids for target_ids: expected -1 to 49, got"):
        lean(model, batch)
