"""FusionTrainer is a Trainer: normalisation, evaluation, and what people use around it, on tiny models."""

import json
import logging
import math

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, modeling_utils, trainer_pt_utils
from transformers.trainer_pt_utils import LengthGroupedSampler

from fusechat_fuse.errors import InputError
from fusechat_fuse.store.shards import load_representation
from fusechat_fuse.training.choice import CHOICES
from fusechat_fuse.training.collator import FusionCollator
from fusechat_fuse.training.config import FusionConfig, device_count, splits_batches
from fusechat_fuse.training.loss import fusion_loss
from fusechat_fuse.training.sampling import mark_repeated, set_epoch
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.fusion_rows import aligned_row, aligned_rows
from tests.helpers.tiny_models import batch_of, tiny_model
from tests.helpers.tiny_runs import VOCAB, aligned_directory, assert_same_run, config, run

pytestmark = pytest.mark.slow
KEPT = hasattr(modeling_utils, "slice_logits_to_keep")  # from transformers 5.21 on


@pytest.mark.parametrize("choice", CHOICES)
def test_accumulation_does_not_change_the_loss(tmp_path, choice):
    rows = aligned_rows(16)
    whole = run(tmp_path, rows, per_device_train_batch_size=8, optim="sgd", fusion_function=choice)
    for size, steps in ((1, 8), (2, 4)):
        parts = run(
            tmp_path,
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            fusion_function=choice,
        )
        assert_same_run(parts, whole)


def test_last_step_with_fewer_batches_is_normalised_by_its_own_tokens(tmp_path):
    rows = aligned_rows(5)
    whole = run(tmp_path, rows, per_device_train_batch_size=4, optim="sgd")
    parts = run(tmp_path, rows, per_device_train_batch_size=1, gradient_accumulation_steps=4, optim="sgd")
    assert len(parts[0]) == 2
    assert_same_run(parts, whole)


@pytest.mark.parametrize("change", [{"lean_head": False}, {"packing": True}, {"activation_checkpointing": True}])
def test_other_ways_to_the_same_loss(tmp_path, change):
    rows = aligned_rows(12)
    plain = {"optim": "sgd"}  # Adam makes a whole step of a gradient that rounding alone has
    assert_same_run(run(tmp_path, rows, **plain, **change), run(tmp_path, rows, **plain), tolerance=3e-5)


def test_compiled(tmp_path):
    rows = aligned_rows(8, tokens=16)
    settings = {"per_device_train_batch_size": 4}
    compiled = run(
        tmp_path,
        rows,
        tiny_model(num_hidden_layers=1),
        torch_compile=True,
        torch_compile_backend="eager",
        **settings,
    )
    assert type(compiled[2].model_wrapped).__name__ == "OptimizedModule"
    assert compiled[0] == pytest.approx(run(tmp_path, rows, tiny_model(num_hidden_layers=1), **settings)[0], rel=1e-4)


def test_weight_one_is_plain_fine_tuning(tmp_path):
    """The baseline of every comparison: the same data at lm_loss_weight 1 gives transformers' own Trainer's numbers."""
    rows = aligned_rows(12)
    mine = run(tmp_path, rows, lm_loss_weight=1.0, gradient_accumulation_steps=2, max_grad_norm=0.0)

    def collate(items):
        batch = FusionCollator(preset="paper")(items)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    model = tiny_model()
    settings = config(tmp_path, train_sampling_strategy="sequential", lr_scheduler_type="constant", warmup_steps=0)
    names = ("per_device_train_batch_size", "num_train_epochs", "learning_rate", "logging_steps", "save_strategy")
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        **{name: getattr(settings, name) for name in names},
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert mine[0] == pytest.approx(theirs, rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(mine[1][name], p.detach(), rtol=1e-4, atol=2e-6)


def test_figures_in_the_logs(tmp_path):
    rows = [*aligned_rows(3, seed=1, source_better=True), *aligned_rows(1, seed=2, source_better=False)]
    options = {"preset": "paper", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    _, _, trainer = run(tmp_path, rows, **options)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["source_share"] == pytest.approx(0.75)
    masses = np.concatenate([row["mapped_mass"].astype(np.float64) for row in rows])
    assert entry["mapped_mass"] == pytest.approx(masses.mean(), rel=1e-5)
    assert entry["loss"] == pytest.approx(0.9 * entry["lm_loss"] + 0.1 * entry["fusion_loss"], rel=1e-5)
    assert entry["tokens_per_second"] > 0
    assert "cut_tokens" not in entry
    _, _, trainer = run(tmp_path, rows, max_length=8)
    assert sum(e.get("cut_tokens", 0) for e in trainer.state.log_history) == sum(len(r["input_ids"]) - 8 for r in rows)


def test_the_choice_is_reported_for_each_source(tmp_path):
    rows = [row | {"source_index": np.array([n % 2])} for n, row in enumerate(aligned_rows(4, source_better=True))]
    rows[1]["source_ce"] = 99.0
    options = {"sources": ["solar", "qwen"]}
    _, _, trainer = run(tmp_path, rows, trainer_options=options, preset="paper")
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert (entry["source_share/solar"], entry["source_share/qwen"]) == (0.5, 0.25)
    assert entry["source_share"] == 0.75


@pytest.mark.parametrize("unlabelled", [16, 8])
def test_training_without_a_predicted_token_is_an_error(tmp_path, unlabelled):
    """Of conversations whose first predicted token is beyond max_length; one that has any is enough."""
    rows = aligned_rows(16, tokens=20, predicted=4)
    for n, row in enumerate(rows):
        row["predicted"] = np.array([12, 14, 16, 18] if n < unlabelled else [2, 3, 4, 5], np.int32)
    data = load_representation(aligned_directory(tmp_path / "data", rows))
    trainer = FusionTrainer(
        tiny_model("Llama", vocab_size=VOCAB), config(tmp_path / "t", max_length=10), train_dataset=data
    )
    if unlabelled == 16:
        with pytest.raises(InputError, match="expected predicted tokens within it, got none within 10 tokens of any"):
            trainer.train()
    else:
        assert trainer.train().training_loss > 0
    trainer.args.num_train_epochs = 0
    assert trainer.train().global_step == 0  # no step is no reason


def test_training_without_a_distribution_to_fuse_is_an_error(tmp_path):
    """Nothing but the source's distribution is trained on, and the source answers nowhere."""
    rows = [
        row | {"source_ids": row["source_ids"] * 0 - 1, "source_probs": row["source_probs"] * 0}
        for row in aligned_rows(4)
    ]
    options = {"lm_loss_weight": 0.0, "fusion_function": "source", "fusion_tail": "drop"}
    with pytest.raises(
        InputError, match=r"expected predicted tokens with a distribution to fuse .* or lm_loss_weight\."
    ):
        run(tmp_path, rows, **options)


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    ("lengths", "changes", "refused"),
    [
        ((20, 40), {}, True),
        ((20, 40), {"max_length": 32}, False),  # the longer one is cut
        ((20, 40), {"per_device_train_batch_size": 1}, False),
        ((20, 30), {}, False),
        ((36, 40), {}, False),
    ],
)
@pytest.mark.parametrize("form", ["directory", "rows"])
def test_long_rope_never_turns_short_conversations_by_the_factors_of_long_ones(
    tmp_path, lengths, changes, refused, form
):
    model = tiny_model("Phi3", vocab_size=VOCAB, rope_parameters=LONG_ROPE, original_max_position_embeddings=32)
    rows = [aligned_row(n, tokens=length) for n, length in enumerate(lengths * 2)]
    data = aligned_directory(tmp_path / "data", rows) if form == "directory" else rows
    settings = config(tmp_path / "t", **{"max_length": 64, **changes})
    if refused or (form == "rows" and not changes):  # whose lengths are not known
        with pytest.raises(
            InputError, match=r"max_length for phi3: expected at most 32 .*, got 64\. Lower it, or set per"
        ):
            FusionTrainer(model, settings, train_dataset=data)
    else:
        FusionTrainer(
            model, settings, train_dataset=data, eval_dataset=aligned_rows(2) if "max_length" in changes else None
        )


def test_evaluation_is_a_mean_over_tokens(tmp_path):
    rows = aligned_rows(7)
    options = config(tmp_path, preset="paper", per_device_eval_batch_size=3)
    trainer = FusionTrainer(tiny_model(), options, train_dataset=rows, eval_dataset=rows)
    metrics = trainer.evaluate()
    batch = FusionCollator(preset="paper")(rows)
    with torch.no_grad():
        logits = tiny_model()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    columns = (batch[name] for name in ("shift_labels", "target_ids", "target_probs"))
    expected = fusion_loss(logits, *columns, lm_loss_weight=0.9)
    for name, value in zip(("eval_loss", "eval_lm_loss", "eval_fusion_loss"), expected):
        assert metrics[name] == pytest.approx(value.item(), rel=1e-5)
    assert 0 <= metrics["eval_source_share"] <= 1
    both = FusionTrainer(
        tiny_model(), config(tmp_path), train_dataset=rows, eval_dataset={"a": rows[:2], "b": rows[2:]}
    )
    assert {"eval_a_lm_loss", "eval_b_lm_loss"} <= both.evaluate().keys()


def test_own_metrics_get_the_logits(tmp_path):
    rows, seen = aligned_rows(4), {}

    def accuracy(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"accuracy": 0.5}

    trainer = FusionTrainer(tiny_model(), config(tmp_path), eval_dataset=rows, compute_metrics=accuracy)
    assert trainer.evaluate()["eval_accuracy"] == 0.5
    T = max(len(row["input_ids"]) for row in rows)
    assert seen["shapes"] == ((4, T, 50), (4, T))


class OwnModel(LlamaForCausalLM):
    """A class nobody knows, whose forward can keep logits of chosen positions."""

    forward = LlamaForCausalLM.forward


class OldModel(LlamaForCausalLM):
    """One that always gives all logits, and takes no further arguments."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)


@pytest.mark.parametrize(
    ("kind", "way"),
    [(OwnModel, "own logits of all labelled positions" if KEPT else "full logits"), (OldModel, "full logits")],
)
def test_unknown_models_go_a_plain_way_and_say_so(tmp_path, caplog, kind, way):
    rows = aligned_rows(8)
    model = kind(tiny_model().config)
    model.load_state_dict(tiny_model().state_dict())
    with caplog.at_level(logging.WARNING, logger="fusechat_fuse"):
        other = run(tmp_path, rows, model, gradient_accumulation_steps=2)
    told = [record.getMessage() for record in caplog.records if "lean head" in record.getMessage()]
    assert len(told) == 1
    assert f"{kind.__name__} is not among the families" in told[0]
    assert way in told[0]
    assert_same_run(other, run(tmp_path, rows, gradient_accumulation_steps=2))


def test_router_loss_is_added(tmp_path):
    rows = aligned_rows(4)
    quiet = run(tmp_path, rows, tiny_model("Mixtral"), max_steps=1)
    routed = run(
        tmp_path, rows, tiny_model("Mixtral", output_router_logits=True, router_aux_loss_coef=0.5), max_steps=1
    )
    with torch.no_grad():
        batch = FusionCollator(preset="paper")(rows)
        model = tiny_model("Mixtral", output_router_logits=True)
        aux = model(batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss
    assert routed[0][0] == pytest.approx(quiet[0][0] + 0.5 * aux.item(), rel=1e-5)


@pytest.mark.parametrize("adapted_modules", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_low_rank_adapters(tmp_path, adapted_modules):
    peft = pytest.importorskip("peft")
    rows = aligned_rows(8)

    def adapted():
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=adapted_modules, init_lora_weights=False)
        return peft.get_peft_model(tiny_model(), lora)

    lean = run(tmp_path, rows, adapted(), activation_checkpointing=True)
    plain = run(tmp_path, rows, adapted(), lean_head=False)
    assert_same_run(lean, plain, tolerance=3e-5)
    start = dict(adapted().named_parameters())
    moved = {name for name, p in lean[1].items() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "lora_" in name}


def test_bfloat16_autocast_trains_float32_weights(tmp_path):
    losses, parameters, _ = run(tmp_path, aligned_rows(16), bf16=True, num_train_epochs=3, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in parameters.values()} == {torch.float32}


def test_half_precision_weights_are_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fusechat_fuse"):
        FusionTrainer(tiny_model().bfloat16(), config(tmp_path, learning_rate=5e-6))
    assert "Trainable weights are bfloat16: steps of 5e-06 are mostly rounded away" in caplog.text


def test_data_from_disk_in_every_form(tmp_path):
    path = aligned_directory(tmp_path / "data", count=8)
    forms = [path, str(path), load_representation(path), datasets.load_from_disk(str(path))]
    runs = [run(tmp_path / "out", form, tiny_model(vocab_size=VOCAB)) for form in forms]
    for other in runs[1:]:
        assert other[0] == runs[0][0]
    assert runs[0][2].sources == ["strong-source"]
    grouped = run(tmp_path / "out", path, tiny_model(vocab_size=VOCAB), train_sampling_strategy="group_by_length")
    assert len(grouped[0]) == 2
    workers = run(tmp_path / "out", path, tiny_model(vocab_size=VOCAB), dataloader_num_workers=1)
    assert workers[0] == runs[0][0]


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
@pytest.mark.parametrize("form", ["rows", "directory"])
def test_a_continued_run_sees_the_batches_of_an_uninterrupted_one(tmp_path, form, strategy):
    """Continued inside the second epoch, whatever numbers were drawn since."""
    rows = aligned_rows(22, vocab_size=500)
    data = rows if form == "rows" else aligned_directory(tmp_path / "data", rows)
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 8, "save_total_limit": None}
    options["train_sampling_strategy"] = strategy

    def trainer():
        return FusionTrainer(tiny_model(vocab_size=VOCAB), config(tmp_path / "t", **options), train_dataset=data)

    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = trainer()
    whole.train()
    epochs = [losses(whole)[n : n + 6] for n in (0, 6, 12)]
    assert len({tuple(np.round(epoch, 4)) for epoch in epochs}) == 3
    continued = trainer()
    torch.rand(7)
    continued.train(resume_from_checkpoint=str(tmp_path / "t" / "checkpoint-8"))
    assert losses(continued) == pytest.approx(losses(whole), rel=1e-5)
    for mine, theirs in zip(continued.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(trainer_pt_utils, "BatchRebalanceSampler"), reason="transformers below 5.20")
@pytest.mark.parametrize("count", [9, 3])
def test_conversations_that_fill_up_a_rebalanced_step_carry_no_label(tmp_path, count):
    """The last step of 9 has one for its four batches, that of 3 has three."""
    options = {"train_sampling_strategy": "batch_rebalance", "num_train_epochs": 2, "save_strategy": "no"}
    rows, batches = aligned_rows(count), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    filled, parameters, _ = run(tmp_path / "a", rows, **options, **batches)
    whole, expected, _ = run(tmp_path / "b", rows, **options, per_device_train_batch_size=4)  # a batch a step
    assert len(whole) == 2 * math.ceil(count / 4)
    assert filled == pytest.approx(whole, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(trainer_pt_utils, "BatchRebalanceSampler"), reason="transformers below 5.20")
@pytest.mark.parametrize(("count", "batch_size"), [(17, 4), (17, 8), (3, 8), (23, 8), (8, 4), (24, 8)])
def test_a_rebalanced_epoch_has_each_conversation_once_whatever_fills_it_up(count, batch_size):
    seen, options = [], {"effective_batch_size": batch_size, "dp_size": 2, "grad_accum": 2, "drop_last": False}
    for rank in range(2):
        theirs, sampler = (
            trainer_pt_utils.BatchRebalanceSampler([9 - n % 7 for n in range(count)], rank=rank, **options)
            for _ in range(2)
        )
        mark_repeated(sampler)
        assert list(sampler) == list(theirs)
        *steps, last = torch.utils.data.BatchSampler(sampler, 2, False)
        seen += [n for step in steps for batch in step for n in batch]
        seen += [n for batch, repeated in zip(last, sampler.repeated, strict=True) if not repeated for n in batch]
    assert sorted(seen) == list(range(count))


def test_grouping_by_length_takes_every_conversation_once_an_epoch():
    loader = torch.utils.data.DataLoader(
        range(8), sampler=LengthGroupedSampler(4, lengths=[5, 50, 6, 51, 7, 52, 8, 53])
    )
    orders = []
    for epoch in (0, 1, 0):
        set_epoch(loader, epoch, seed=3)
        orders.append([int(n) for n in loader])
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] == orders[2] != orders[1]


def test_a_sampler_of_your_own_may_draw_another_number(tmp_path):
    """Rows that no process was filled up with are trained on."""
    rows = aligned_rows(9)

    class Own(FusionTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(range(8))

    trainer = Own(tiny_model(), config(tmp_path, warmup_steps=0, lr_scheduler_type="constant"), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(run(tmp_path, rows[:8])[0], rel=1e-5)


def test_a_new_model_for_each_run(tmp_path):
    rows = aligned_rows(4)
    trainer = FusionTrainer(model_init=lambda: tiny_model(), args=config(tmp_path, max_steps=1), train_dataset=rows)
    trainer.train()
    assert trainer.loss_path == "lean"


@pytest.mark.parametrize(
    ("preset", "weight", "choice"),
    [
        ("fusechat", 0.5, ("avg_ce_slice", "label", "label", "byte")),
        ("paper", 0.9, ("min_ce", "pivot", "drop", "token")),
    ],
)
def test_defaults_are_the_presets(tmp_path, preset, weight, choice):
    got = FusionConfig(str(tmp_path), use_cpu=True, preset=preset)
    assert (got.fusion_function, got.fusion_fallback, got.fusion_tail, got.ce_unit) == choice
    assert (got.lm_loss_weight, got.fusion_loss_type) == (weight, "ce")
    assert (got.fuse_temperature, got.max_length) == (1.0, 2048)
    assert FusionConfig(str(tmp_path), use_cpu=True, preset=preset, lm_loss_weight=0.7).lm_loss_weight == 0.7
    assert (got.num_train_epochs, got.learning_rate, got.lr_scheduler_type) == (3, 5e-6, "cosine")
    assert (got.get_warmup_steps(1000), got.weight_decay) == (30, 0)
    assert got.per_device_train_batch_size * got.gradient_accumulation_steps == 128


@pytest.mark.parametrize(
    ("environment", "use_cpu", "devices"),
    [
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "3"}, True, 8),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "3"}, False, 8),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, False, 1),  # torchrun with one process: one GPU
        ({}, True, 1),
        ({}, False, 4),  # one process without a launcher drives all GPUs
    ],
)
def test_devices_of_a_run(monkeypatch, environment, use_cpu, devices):
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_count(use_cpu=use_cpu) == devices


@pytest.mark.parametrize(("given", "expected"), [({"split_batches": True}, True), ({"even_batches": True}, False)])
def test_batches_are_split_however_the_flag_is_given(tmp_path, given, expected):
    (tmp_path / "a.json").write_text(json.dumps(given))
    for form in (given, json.dumps(given), str(tmp_path / "a.json")):
        assert splits_batches(form) == expected
    options = FusionConfig(str(tmp_path), use_cpu=True, accelerator_config=given)
    assert splits_batches(options.accelerator_config) == expected
    assert not splits_batches(None)


@pytest.mark.parametrize(("size", "steps", "warned"), [(4, 3, False), (6, 2, False), (8, 2, True), (100, 1, True)])
def test_accumulation_follows_from_the_total_batch_size(tmp_path, caplog, size, steps, warned):
    with caplog.at_level(logging.WARNING, logger="fusechat_fuse"):
        got = FusionConfig(str(tmp_path), use_cpu=True, total_batch_size=12, per_device_train_batch_size=size)
    assert got.gradient_accumulation_steps == steps
    assert got.conversations_per_step == size * steps
    told = (
        f"{size * steps} conversations per step instead of total_batch_size 12: {size} at a time x {steps} accumulated"
    )
    assert (told in caplog.text) == warned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion_function": "best"}, "value for fusion_function: expected one of min_ce"),
        ({"fusion_loss_type": "jsd"}, "value for fusion_loss_type: expected one of ce, kl"),
        ({"lm_loss_weight": 1.2}, "value for lm_loss_weight: expected 0 to 1, got 1.2"),
        ({"fuse_temperature": 0}, "value for fuse_temperature: expected more than 0"),
        ({"fuse_temperature": float("inf")}, "value for fuse_temperature: expected more than 0"),
        ({"learning_rate": float("nan")}, "value for learning_rate: expected a number from 0"),
        ({"learning_rate": -1.0}, "value for learning_rate: expected a number from 0"),
        ({"label_smoothing_factor": 0.1}, "value for label_smoothing_factor: expected 0"),
        ({"per_device_train_batch_size": 0}, "value for per_device_train_batch_size: expected at least 1, got 0"),
        ({"gradient_accumulation_steps": -1}, "value for gradient_accumulation_steps: expected at least 1, got -1"),
        ({"gradient_accumulation_steps": 0}, "value for gradient_accumulation_steps: expected at least 1, got 0"),
        ({"remove_unused_columns": True}, "value for remove_unused_columns: expected False"),
    ],
)
def test_values_that_fusion_cannot_use(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        config(tmp_path, **change)


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected a FusionConfig, got TrainingArguments"):
        FusionTrainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True))


def test_direct_call_without_num_items(tmp_path):
    trainer = FusionTrainer(tiny_model(), config(tmp_path, lm_loss_weight=0.9))
    batch = batch_of()
    logits = tiny_model()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    columns = (batch[name] for name in ("shift_labels", "target_ids", "target_probs"))
    expected = fusion_loss(logits, *columns, lm_loss_weight=0.9)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.loss.item(), rel=1e-5)
