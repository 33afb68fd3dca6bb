"""What follows lm_head: the families' own forwards bit by bit, and no torch until a tensor comes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from fusechat_fuse.capture.distributions import PredictionHead
from fusechat_fuse.models.logit_transform import FAMILIES, LogitTransform, possible_transforms, transform_of
from tests.helpers import tiny_models

TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.3),
    LogitTransform(divisor=6.0),
    LogitTransform(cap=2.0),
    LogitTransform(scale=0.3, divisor=2.0, cap=1.5),
]


def test_hand_computed():
    z = torch.tensor([0.0, 3.0, -30.0], dtype=torch.float64)
    assert LogitTransform(scale=2, divisor=3)(z).tolist() == [0, 2, -20]
    assert LogitTransform(divisor=2, cap=3)(z).tolist() == pytest.approx([0, 3 * math.tanh(0.5), 3 * math.tanh(-5)])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_in_place_and_slope_follow_the_function(transform):
    z = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = transform(z)
    buffer = z.detach().clone()
    assert transform.apply_(buffer) is buffer
    assert torch.equal(buffer, out)
    (gradient,) = torch.autograd.grad(out.sum(), z)
    slope = transform.slope(out.detach())
    assert (slope is None) == (transform == LogitTransform())
    expected = torch.ones_like(z) if slope is None else torch.ones_like(z) * slope
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, "Granite by 6"])
def test_every_familys_own_forward(family, dtype):
    changes = {"logits_scaling": 6.0} if family == "Granite by 6" else {}
    model = tiny_models.tiny_model(family.split()[0], dtype=dtype, **changes).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        raw = model.lm_head(model.model(input_ids=ids).last_hidden_state)
        assert torch.equal(transform_of(model)(raw), model(input_ids=ids).logits)


def test_every_known_family_is_tried():
    assert {f"{name.split('-')[0]}ForCausalLM" for name in tiny_models.FAMILIES} == set(FAMILIES)


def test_a_class_of_another_is_unknown_whatever_its_name():
    own = type("LlamaForCausalLM", (transformers.LlamaForCausalLM,), {})
    assert transform_of(own(tiny_models.tiny_model().config)) is None


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, []),
        ({"final_logit_softcapping": None, "logit_scale": 1.0}, []),
        ({"final_logit_softcapping": 30.0}, [LogitTransform(cap=30.0)]),
        ({"lm_head_multiplier": 4}, [LogitTransform(scale=4), LogitTransform(divisor=4)]),
    ],
)
def test_what_a_configuration_may_mean(numbers, expected):
    assert possible_transforms(SimpleNamespace(**numbers)) == [*expected, LogitTransform()]


def test_capture_trusts_no_family_that_changes_its_logits():
    """Known by class, but this one's forward was replaced: it must go through that forward."""
    model = tiny_models.tiny_model().eval()
    assert PredictionHead(model, np.arange(16)).after == LogitTransform()
    own = model.forward

    def halved(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits / 2
        return out

    model.forward = halved
    assert PredictionHead(model, np.arange(16)).after is None
