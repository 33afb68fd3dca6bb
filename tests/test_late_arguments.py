"""Arguments are read when training starts: hyper-parameter trials and late changes count, what cannot be is refused."""

import dataclasses
import logging

import pytest

from fusechat_fuse.errors import InputError
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_runs import config

pytestmark = pytest.mark.slow

CHANGES = {
    "fusion_function": "source",
    "fuse_temperature": 2.0,
    "max_length": 8,
    "packing": True,
    "fusion_loss_type": "kl",
    "ce_unit": "byte",
}


@pytest.mark.parametrize("name", CHANGES)
def test_arguments_changed_late_are_those_of_the_run(tmp_path, name):
    rows = [row | {"source_bytes": 1} for row in aligned_rows(8)]  # no source is better per byte
    settings = config(tmp_path, preset="paper", max_steps=1)
    trainer = FusionTrainer(tiny_model(), settings, train_dataset=rows)
    trainer.data_collator.pad_to_multiple_of = 4  # the user's own, kept
    setattr(trainer.args, name, CHANGES[name])
    trainer.train()
    assert trainer.data_collator.pad_to_multiple_of == 4
    early = FusionTrainer(
        tiny_model(),
        dataclasses.replace(config(tmp_path, preset="paper", max_steps=1), **{name: CHANGES[name]}),
        train_dataset=rows,
    )
    early.train()
    plain = FusionTrainer(tiny_model(), config(tmp_path, preset="paper", max_steps=1), train_dataset=rows)
    plain.train()
    figures = [
        {key: entry.get(key, 0) for key in ("loss", "lm_loss", "fusion_loss", "source_share", "cut_tokens")}
        for entry in (one.state.log_history[0] for one in (trainer, early, plain))
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    if name == "packing":
        assert trainer.data_collator.packing
    else:
        assert figures[0] != pytest.approx(figures[2], rel=1e-5)


def test_a_late_value_that_fusion_cannot_use_is_refused(tmp_path):
    trainer = FusionTrainer(tiny_model(), config(tmp_path), train_dataset=aligned_rows(4))
    trainer.args.fusion_loss_type = "jsd"
    with pytest.raises(InputError, match="value for fusion_loss_type: expected one of ce, kl, got 'jsd'"):
        trainer.train()


def test_another_loss_is_refused(tmp_path):
    with pytest.raises(InputError, match="compute_loss_func for FusionTrainer: expected none"):
        FusionTrainer(tiny_model(), config(tmp_path), compute_loss_func=lambda outputs, labels, **kwargs: 0)


def test_a_batch_size_that_was_found_keeps_the_conversations_of_a_step(tmp_path, monkeypatch, caplog):
    """auto_find_batch_size takes nine tenths after an out of memory: 8, 7, 6, ..."""
    settings = config(
        tmp_path,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=None,
        total_batch_size=16,
        auto_find_batch_size=True,
        logging_steps=1,
    )
    trainer = FusionTrainer(tiny_model(), settings, train_dataset=aligned_rows(32))
    step = FusionTrainer.training_step

    def out_of_memory(self, model, inputs, *args):
        if len(inputs["input_ids"]) > 5:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *args)

    monkeypatch.setattr(FusionTrainer, "training_step", out_of_memory)
    with caplog.at_level(logging.WARNING, logger="fusechat_fuse"):
        trainer.train()
    assert settings.gradient_accumulation_steps == 3
    assert settings.conversations_per_step == 15
    told = "Batches of 5 instead of 8 conversations fit: 3 accumulated, 15 conversations per step (16 set)."
    assert told in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("given", "changes", "steps"),
    [
        ({"gradient_accumulation_steps": None, "total_batch_size": 16}, {"total_batch_size": 8}, 2),
        ({"gradient_accumulation_steps": None, "total_batch_size": 16}, {"per_device_train_batch_size": 2}, 8),
        ({"gradient_accumulation_steps": None, "total_batch_size": 16}, {"gradient_accumulation_steps": 3}, 3),
        ({"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 2}, 2),
    ],
)
def test_accumulation_of_a_trial(tmp_path, given, changes, steps):
    settings = config(tmp_path, **given)
    for _ in range(2):
        for name, value in changes.items():
            setattr(settings, name, value)
        settings.fit_accumulation(settings.train_batch_size)
        assert settings.gradient_accumulation_steps == steps
