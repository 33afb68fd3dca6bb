"""min_ce_slice from data to batches: who serves a slice, what the Trainer makes of it, and what it says."""

import inspect
import json
import logging
import math

import numpy as np
import pytest
import torch

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.shards import load_representation
from fusechat_fuse.training.card import slice_lines
from fusechat_fuse.training.collator import STATS, FusionCollator
from fusechat_fuse.training.loss import fusion_loss
from fusechat_fuse.training.run import train
from fusechat_fuse.training.slice_choice import format_slice_choice, source_by_slice
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_runs import VOCAB, aligned_directory, config, pivot_directory


def sliced_rows(wrong: int = 4) -> list[dict]:
    """40 conversations by turns of two slices; the source knows "good", but for `wrong` answers that it finds odd."""
    rows = aligned_rows(40, vocab_size=500)
    for n, row in enumerate(rows):
        knows = n % 2 and n >= 2 * wrong
        row |= {"id": f"{'good' if n % 2 else 'bad'}-{n}", "slice": "good" if n % 2 else "bad"}
        row["source_ce"] = float(row["ce"].mean()) + (-0.5 if knows else 5.0)
    return rows


@pytest.fixture
def data(tmp_path):
    return load_representation(aligned_directory(tmp_path / "data", sliced_rows()))


@pytest.mark.parametrize("how", [{}, {"pattern": "^[a-z]+"}], ids=["column", "pattern"])
def test_a_slice_takes_its_best_model_for_wrong_answers_too(data, how):
    weight = source_by_slice(data, ce_unit="token", **how)
    assert [weight(row) > 0 for row in data] == [False, True] * 20
    assert weight.choice.table["good"]["conversations"] == 20
    pivot, source = weight.choice.table["good"]["medians"]  # of right and wrong answers together
    assert weight(data[1]) == pytest.approx(math.exp(-source) / (math.exp(-source) + math.exp(-pivot)))
    assert weight({"id": "good-99", "slice": "good"}) == weight(data[1])  # evaluation data: by the slice's name
    assert (weight.sharpness, source_by_slice(data, ce_unit="byte", **how).sharpness) == (1, 4)


def test_rows_in_python_have_the_slices_that_are_asked_for(data, caplog):
    rows = [row | {"slice": "good"} for row in data]
    by_id = source_by_slice(rows, ce_unit="token", pattern="^[a-z]+")
    assert by_id.choice == source_by_slice(data, ce_unit="token").choice
    assert [by_id(row) > 0 for row in rows] == [False, True] * 20
    assert set(source_by_slice(rows, ce_unit="token").choice.table) == {"", "good"}
    whole = source_by_slice(rows, ce_unit="token", column="none").choice
    assert list(whole.table) == [""]
    with pytest.raises(InputError, match="slice_column for rows in Python: expected slice or none, got 'auto'"):
        source_by_slice(rows, ce_unit="token", column="auto")
    with pytest.raises(InputError, match="slice_pattern: expected one that matches ids of the training data"):
        source_by_slice(rows, ce_unit="token", pattern="zzz")
    assert "No row names a slice" not in caplog.text
    source_by_slice([row | {"slice": None} for row in rows], ce_unit="token")
    assert "No row names a slice, and slices are found in directories of align and combine alone." in caplog.text


def test_a_source_that_gives_nothing_is_said(data):
    worse = [row | {"source_ce": 99.0} for row in data]
    said = "no slice takes anything from a source: with the label as fallback this is plain fine-tuning"
    log = format_slice_choice(source_by_slice(worse, ce_unit="token"), ["pivot", "source"], "token")
    assert log.splitlines()[-1] == f"  {said}"
    assert said not in format_slice_choice(source_by_slice(data, ce_unit="token"), ["pivot", "source"], "token")


@pytest.mark.parametrize(("unit", "sharpness"), [("token", 1), ("byte", 4)])
def test_data_combined_by_slice_bring_their_choice_and_its_unit(tmp_path, unit, sharpness):
    table = {  # against what these rows say
        "": {"best": 2, "medians": [4, 5, 3], "decides": True},
        "bad": {"best": 2, "medians": [3, 9, 1], "decides": True},
        "good": {"best": 2, "medians": [1, 2, 3], "decides": False},
    }
    data = load_representation(
        aligned_directory(
            tmp_path / "c", sliced_rows(), kind="combined", slices=table, slice_models=[], options={"ce_unit": unit}
        )
    )
    weight = source_by_slice(data, ce_unit="token")
    bad, as_all = (pytest.approx(1 / (1 + math.exp(gap * sharpness))) for gap in (-2, -1))
    assert [weight(row) for row in data] == [bad, as_all] * 20


def test_a_slice_that_cannot_tell_is_named_in_log_and_card(tmp_path):
    rows = sliced_rows(wrong=0)
    for row in rows[:16:2]:  # eight of the bad become a slice of their own, seven of them known to the source
        row["slice"] = "few"
    for row in rows[:14:2]:
        row["source_ce"] = float(row["ce"].mean()) - 0.75
    chosen = source_by_slice(load_representation(aligned_directory(tmp_path / "d", rows)), ce_unit="token")
    line = "slice few (8 conversations, 7 of 8 better): too few to tell, takes the choice of all data"
    models = ["pivot", "source"]
    log = format_slice_choice(chosen, models, "token").splitlines()
    assert [text for text in log if "takes the choice" in text] == [f"  {line}"]
    table = chosen.choice.table
    card = slice_lines({"ce_unit": "token", "models": models, "slices": table})
    assert [text for text in card if "takes the choice" in text] == [f"- {line}"]
    pivot, source = table[""]["medians"]
    assert (
        chosen(rows[0])
        == chosen({"id": "x", "slice": "never seen"})
        == pytest.approx(1 / (1 + math.exp(source - pivot)))
    )
    assert table["few"]["medians"] != table[""]["medians"]


def test_the_trainer_chooses_before_training_and_says_so(data, tmp_path, caplog):
    options = {"ce_unit": "token", "max_steps": 2, "logging_steps": 2}
    with caplog.at_level(logging.INFO, "fusechat_fuse"):
        trainer = FusionTrainer(
            tiny_model("Llama", vocab_size=VOCAB), config(tmp_path / "t", **options), train_dataset=data
        )
    assert "bad: " in caplog.text
    assert "-> strong-source, 20 conversations" in caplog.text
    batch = trainer.data_collator([data[0], data[1]])
    share = batch["conversation_stats"][:, 0, STATS.index("source_share")]
    assert share.tolist() == [0, pytest.approx(source_by_slice(data, ce_unit="token")(data[1]))]
    labels = batch["shift_labels"][0]
    at = labels >= 0
    assert torch.equal(batch["target_ids"][0, at, 0], labels[at])  # the label carries the whole weight
    assert torch.equal(batch["target_probs"][0, at].sum(-1), torch.ones(int(at.sum())))
    trainer.train()
    trainer.args.slice_pattern = "^(bad)"  # a late change: the others are in no slice
    trainer.get_train_dataloader()
    assert set(trainer.data_collator.slice_choice.choice.table) == {"", "bad"}


@pytest.mark.slow
def test_the_target_keeps_who_served_which_slice(data, tmp_path):
    options = {"fusion_function": "min_ce_slice", "ce_unit": "token", "max_steps": 1}
    train(pivot_directory(tmp_path / "pivot"), data.path, config(tmp_path / "t", **options))
    kept = json.loads((tmp_path / "t" / "slices.json").read_bytes())
    assert (kept["ce_unit"], kept["models"]) == ("token", ["pivot", "strong-source"])
    good = kept["slices"]["good"]
    assert (good["best"], good["conversations"]) == (1, 20)
    assert good["medians"][1] < good["medians"][0]
    card = (tmp_path / "t" / "README.md").read_text()
    medians = " | ".join(f"{median:.4f}" for median in good["medians"])
    assert f"| good | 20 | {medians} | strong-source |" in card
    train(tmp_path / "pivot", data.path, config(tmp_path / "paper", preset="paper", max_steps=1))
    assert not (tmp_path / "paper" / "slices.json").exists()


def test_a_collator_made_by_hand_trains_on_what_the_trainers_own_would(data, tmp_path):
    settings = config(tmp_path / "t")
    batches = [
        FusionTrainer(
            tiny_model("Llama", vocab_size=VOCAB), settings, data_collator=collator, train_dataset=data
        ).data_collator([data[0], data[1]])
        for collator in (None, FusionCollator())
    ]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    weight = inspect.signature(fusion_loss).parameters["lm_loss_weight"].default
    assert weight == settings.lm_loss_weight == 0.5


def test_a_collator_by_hand_needs_the_choice(data):
    with pytest.raises(InputError, match="slice_choice for min_ce_slice: expected what source_by_slice makes"):
        FusionCollator(fusion_function="min_ce_slice")([data[0]])
    collate = FusionCollator(fusion_function="min_ce_slice", slice_choice=source_by_slice(data, ce_unit="byte"))
    assert np.isfinite(collate([data[0]])["target_probs"].numpy()).all()
