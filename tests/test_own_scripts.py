"""docs/api.md, "Your own scripts": a weight schedule, a collator, a loss and a search of one's own, as they stand."""

import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

from fusechat_fuse.errors import InputError
from fusechat_fuse.training.collator import FusionCollator
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_runs import aligned_directory, config, pivot_directory, run
from tests.test_docs import ROOT, blocks

pytestmark = pytest.mark.slow
SOURCE = {"fusion_function": "source", "fusion_tail": "drop"}


class Trial(SimpleNamespace):
    """A trial whose every parameter has one value."""

    def suggest_float(self, name, *args, **options):
        return self.value


class Optuna:
    """A stand-in for transformers' backend: two trials, and the one of lowest objective."""

    default_hp_space = ensure_available = staticmethod(lambda *args: None)

    def run(self, trainer, n_trials, direction, **kwargs):
        trainer.trials = []
        for number, value in enumerate((1e-3, 1e-2)):
            trainer.train(trial=Trial(params={}, number=number, value=value))
            trainer.trials.append((trainer.objective, str(number), trainer.state.log_history))
        objective, number, _ = min(trainer.trials, key=lambda one: one[0])
        return BestRun(number, objective, {})


@pytest.fixture
def optuna(monkeypatch):
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Optuna)
    module = ModuleType("optuna")
    vars(module).update(__spec__=ModuleSpec("optuna", None), trial=SimpleNamespace(BaseTrial=Trial))
    monkeypatch.setitem(sys.modules, "optuna", module)


def test_the_pages_script_runs_as_it_stands(optuna, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pivot_directory(tmp_path / "models" / "pivot")
    aligned_directory(tmp_path / "aligned" / "source")
    aligned_directory(tmp_path / "aligned" / "held-out", count=8, seed=5)
    *_, script = blocks(ROOT / "docs" / "api.md", "python")
    (call,) = [line for line in script.splitlines() if "FusionConfig(" in line and "args=" in line]
    tiny = 'FusionConfig("search", per_device_train_batch_size=4, total_batch_size=8, save_strategy="no", '
    names: dict = {}
    exec(script.replace(call, call.replace('FusionConfig("search", ', tiny)), names)
    trials = names["trainer"].trials
    for objective, _, history in trials:
        assert objective == [entry["eval_lm_loss"] for entry in history if "eval_lm_loss" in entry][-1]
    assert names["best"].objective == min(objective for objective, *_ in trials)


def test_a_search_minimises_the_evaluations_lm_loss_and_logs_each_trial_alone(optuna, tmp_path):
    """Four steps of which the last is not logged: its figures would be the next trial's first ones."""
    settings = config(tmp_path, logging_steps=3, eval_strategy="epoch", learning_rate=0.0, **SOURCE)
    rows = aligned_rows(16)
    trainer = FusionTrainer(
        args=settings, model_init=lambda: tiny_model(), train_dataset=rows, eval_dataset={"a": rows[:8], "b": rows[8:]}
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"lm_loss_weight": trial.suggest_float("lm_loss_weight", 0.1, 0.9)}, backend="optuna"
    )
    metrics = FusionTrainer(
        tiny_model(), settings, train_dataset=rows, eval_dataset={"a": rows[:8], "b": rows[8:]}
    ).evaluate()
    expected = (metrics["eval_a_lm_loss"] + metrics["eval_b_lm_loss"]) / 2
    assert best.objective == pytest.approx(expected, rel=1e-6)
    first, second = (trial[2][0]["lm_loss"] for trial in trainer.trials)
    assert first == pytest.approx(second, rel=1e-6)


def test_a_weight_that_a_callback_changes_is_the_steps_weight(tmp_path):
    weights = [1.0, 0.75, 0.5, 0.25]

    class Schedule(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.lm_loss_weight = weights[state.global_step]

    options = {"trainer_options": {"callbacks": [Schedule()]}, "gradient_accumulation_steps": 2, **SOURCE}
    losses, _, trainer = run(tmp_path, aligned_rows(16), per_device_train_batch_size=2, **options)
    parts = [(e["lm_loss"], e["fusion_loss"]) for e in trainer.state.log_history if "lm_loss" in e]
    assert losses == pytest.approx([w * lm + (1 - w) * fused for w, (lm, fused) in zip(weights, parts)], rel=1e-5)
    weights[2] = 1.5
    with pytest.raises(InputError, match=r"value for lm_loss_weight: expected \[0, 1\], got 1.5"):
        run(tmp_path, aligned_rows(24), **options)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("masked", ["labels", "shift_labels"])
def test_a_label_that_a_collator_masks_is_not_trained_on(tmp_path, masked, packing):
    class Even(FusionCollator):
        """Labels at even places alone; `both` masks both columns."""

        both = False

        def __call__(self, rows):
            batch = super().__call__(rows)
            if self.both or masked == "labels":
                batch["labels"][:, 1::2] = -100
            if self.both or masked == "shift_labels":
                batch["shift_labels"][:, ::2] = -100
            return batch

    class Both(Even):
        both = True

    rows, found = aligned_rows(12), []
    for kind in (Even, Both):
        collator = kind(packing=packing, **SOURCE)
        losses, weights, trainer = run(tmp_path, rows, trainer_options={"data_collator": collator}, **SOURCE)
        found.append((losses, weights, trainer.evaluate(rows)["eval_loss"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-6)
    for name, weight in found[0][1].items():
        torch.testing.assert_close(weight, found[1][1][name])
    assert found[0][0] != pytest.approx(run(tmp_path, rows, **SOURCE)[0], rel=1e-3)


@pytest.mark.parametrize("name", ["labels", "target_ids", "conversation_stats"])
def test_a_batch_without_a_column_is_refused(tmp_path, name):
    base = FusionCollator(**SOURCE)

    def collate(rows):
        return {key: value for key, value in base(rows).items() if key != name}

    with pytest.raises(InputError, match=f"batch for FusionTrainer: expected what .*, got none of {name}"):
        run(tmp_path, aligned_rows(4), trainer_options={"data_collator": collate})


@pytest.mark.parametrize(("options", "told"), [({}, ["fusion_function, fusion_tail"]), (SOURCE, [])])
def test_options_that_a_collator_has_otherwise_are_logged(tmp_path, caplog, options, told):
    collator = FusionCollator(**options)
    with caplog.at_level(logging.WARNING, logger="fusechat_fuse"):
        FusionTrainer(tiny_model(), config(tmp_path, **SOURCE), collator, aligned_rows(4))
    expected = [f"data_collator: its own {names} instead of those in the arguments." for names in told]
    assert [text for text in caplog.messages if text.startswith("data_collator")] == expected


def test_a_loss_of_ones_own_is_evaluated(tmp_path):
    class Own(FusionTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, sums = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (loss + 7, sums) if return_outputs else loss + 7

    data = {"train_dataset": aligned_rows(4), "eval_dataset": aligned_rows(10, seed=1)}
    settings = config(tmp_path, per_device_eval_batch_size=3, **SOURCE)
    plain, own = (kind(tiny_model(), settings, **data).evaluate() for kind in (FusionTrainer, Own))
    assert own["eval_loss"] == pytest.approx(plain["eval_loss"] + 7, rel=1e-6)
    assert own["eval_lm_loss"] == pytest.approx(plain["eval_lm_loss"], rel=1e-6)


def test_an_iterable_that_can_be_read_once_is_refused(tmp_path):
    class Once(torch.utils.data.IterableDataset):
        rows = iter(aligned_rows(4))

        def __iter__(self):
            return self.rows

    with pytest.raises(InputError, match="data for FusionTrainer: expected an iterable whose rows can be read again"):
        FusionTrainer(tiny_model(), config(tmp_path, max_steps=1), train_dataset=Once())
