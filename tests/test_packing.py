"""Packing is refused where a model lets packed conversations see one another."""

import logging

import pytest
import torch
import transformers

from fusechat_fuse.errors import InputError
from fusechat_fuse.training.packing import check_packing
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_models import FAMILIES, SIZES, tiny_model
from tests.helpers.tiny_runs import config

pytestmark = pytest.mark.slow

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
APART = {
    **{family: {} for family in FAMILIES},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {**FAMILIES["Gemma2"], "sliding_window": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "Olmo2": {},
    "GPTNeoX": {},
}
MIXED = {
    "GptOss": {**EXPERTS, "sliding_window": 8},
    "MiniMax": EXPERTS,
    "Bloom": {"n_head": 2, "n_layer": 2},
    "Mamba": {},
}


class Positionless(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", APART)
def test_families_that_keep_packed_conversations_apart(family, dtype):
    model = tiny_model(family, dtype=dtype, **APART[family]).train()
    check_packing(model)
    assert model.training


@pytest.mark.parametrize("family", MIXED)
def test_families_that_mix_packed_conversations_are_refused(tmp_path, family):
    model = tiny_model(family, **MIXED[family])
    message = rf"packing for {family}ForCausalLM: expected conversations that do not see one another, got .*\d%"
    with pytest.raises(InputError, match=message):
        FusionTrainer(model, config(tmp_path / "t", packing=True), train_dataset=aligned_rows(4))
    FusionTrainer(model, config(tmp_path / "t"), train_dataset=aligned_rows(4))


def test_a_model_without_position_ids_is_refused(tmp_path):
    with pytest.raises(InputError, match="packing for Positionless: expected a model that takes position ids"):
        FusionTrainer(Positionless(tiny_model().config), config(tmp_path, packing=True))


def test_what_cannot_be_tried_is_said(caplog):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with caplog.at_level(logging.WARNING, logger="fusechat_fuse"):
        check_packing(model)
    assert "Packing was not tried on LlamaForCausalLM" in caplog.text
