"""What a FusionTrainer may be given: rows in every form, any padding id; what is refused when it is made."""

import itertools
import logging
from types import SimpleNamespace

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fusechat_fuse.errors import InputError
from fusechat_fuse.training import slice_choice
from fusechat_fuse.training.dataset import open_dataset
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_runs import aligned_directory, config, run, tokenizer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pad", [50, 10**6, -1])
def test_padding_may_be_any_id(tmp_path, pad):
    class Tokenizer(PreTrainedTokenizerFast):
        pad_token_id = pad

    own = Tokenizer(tokenizer_object=tokenizer().backend_tokenizer)
    rows = aligned_rows(8)
    trainer = FusionTrainer(tiny_model(), config(tmp_path), train_dataset=rows, processing_class=own)
    assert trainer.data_collator.pad_token_id == 0
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


def without(name, rows):
    return [{key: value for key, value in row.items() if key != name} for row in rows]


@pytest.mark.parametrize(
    "name", ["input_ids", "predicted", "topk_ids", "topk_logprobs", "ce", "source_ids", "source_ce"]
)
def test_rows_without_a_column_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"column '{name}' for conversation 'c0': expected an aligned row"):
        FusionTrainer(tiny_model(), config(tmp_path), train_dataset=without(name, aligned_rows(2)))


BAD_DATA = {
    "texts": (["Hello"], "row for FusionCollator: expected an aligned row, got str"),
    "nothing": ([], "data for list: expected conversations, got none"),
    "a generator": (
        (row for row in aligned_rows(2)),
        "data for FusionTrainer: expected .*, got generator. Make a list or",
    ),
    "an endless iterable": (
        datasets.IterableDataset.from_generator(lambda: iter(aligned_rows(2))),
        "max_steps for IterableDataset: expected more than 0",
    ),
}


@pytest.mark.parametrize(("data", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_data_that_nothing_can_begin_with_is_refused(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        FusionTrainer(tiny_model(), config(tmp_path), train_dataset=data)


def test_evaluation_data_is_looked_at_too(tmp_path):
    with pytest.raises(InputError, match="column 'source_ids' for conversation 'c0'"):
        FusionTrainer(tiny_model(), config(tmp_path), eval_dataset={"a": without("source_ids", aligned_rows(2))})


class Oversampled(torch.utils.data.Dataset):
    """Map-style rows of any index, as oversampling has them: only the length says where they end."""

    def __init__(self, rows, length):
        self.rows, self.length = rows, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


@pytest.mark.parametrize("strategy", ["sequential", "group_by_length", "batch_rebalance"])
def test_map_style_data_end_at_their_length(tmp_path, strategy):
    rows = aligned_rows(5)
    data = Oversampled(rows, 8)
    options = {"train_sampling_strategy": strategy, "trainer_options": {"eval_dataset": data}}
    losses, _, trainer = run(tmp_path, data, **options)
    assert trainer.slices["slices"][""]["conversations"] == 8
    assert trainer.train_dataset is data
    written_out = rows + rows[:3]
    expected = run(tmp_path, written_out, train_sampling_strategy=strategy)
    assert losses == pytest.approx(expected[0], rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected[2].evaluate(written_out)["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("to_train_on", [False, True])
def test_iterables_are_refused_on_several_processes(to_train_on):
    """accelerate joins batches of one length only, and trains on the rows that fill up the last."""
    stream = datasets.IterableDataset.from_generator(lambda: iter(aligned_rows(2)))
    args = SimpleNamespace(world_size=1, max_steps=1)
    assert open_dataset(stream, args, to_train_on=to_train_on) is stream
    args.world_size = 2
    with pytest.raises(InputError, match=r"on 2 processes: expected rows with a length, .* got IterableDataset"):
        open_dataset({"a": stream}, args, to_train_on=to_train_on)


def test_rows_of_lists_and_iterables_give_the_same_run(tmp_path):
    rows = aligned_rows(8)
    as_lists = [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in rows]
    plain = run(tmp_path, rows, max_steps=2)
    assert run(tmp_path, datasets.Dataset.from_list(as_lists), max_steps=2)[0] == pytest.approx(plain[0], rel=1e-3)
    stream = datasets.Dataset.from_list(as_lists).to_iterable_dataset()
    assert run(tmp_path, stream, max_steps=2)[0] == pytest.approx(plain[0], rel=1e-3)
    folder = aligned_directory(tmp_path / "data", rows)
    stored = datasets.load_from_disk(str(folder)).to_iterable_dataset()
    assert run(tmp_path, stored, max_steps=2)[0] == pytest.approx(plain[0], rel=1e-3)


def test_an_iterable_without_an_end_is_chosen_from_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(slice_choice, "MAX_SAMPLED_ROWS", 6)
    taken = []

    def endless():
        for n in itertools.count():
            taken.append(n)
            yield {k: v.tolist() if hasattr(v, "tolist") else v for k, v in aligned_rows(1, seed=n)[0].items()}

    stream = datasets.IterableDataset.from_generator(endless)
    trainer = FusionTrainer(tiny_model(), config(tmp_path, max_steps=1), train_dataset=stream)
    assert trainer.slices["slices"][""]["conversations"] == 6
    assert len(taken) < 10


def test_adapters_that_add_tokens_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(InputError, match=r"expected some that add no tokens .*, got PromptTuningConfig"):
        FusionTrainer(model, config(tmp_path), train_dataset=aligned_rows(2))


@pytest.mark.parametrize(("every", "logged"), [(10, 2), (2, 1), (1, 2)])
def test_a_run_with_fewer_steps_than_logging_steps_is_logged(tmp_path, caplog, every, logged):
    with caplog.at_level(logging.INFO, logger="fusechat_fuse"):
        losses = run(tmp_path, aligned_rows(8), logging_steps=every)[0]
    assert len(losses) == logged
    assert ("2 steps in all, fewer than logging_steps 10: each is logged." in caplog.text) == (every == 10)


def test_nothing_is_said_of_tokens_that_the_target_does_not_have(tmp_path, caplog):
    model = tiny_model(vocab_size=640)
    model.config.eos_token_id = model.generation_config.eos_token_id = 7
    trainer = FusionTrainer(
        model, config(tmp_path, max_steps=1), train_dataset=aligned_rows(4), processing_class=tokenizer()
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "tokens that differ from the model config" not in caplog.text


def test_evaluation_takes_a_directory_as_well(tmp_path):
    rows = aligned_rows(6, vocab_size=50)
    made = aligned_directory(tmp_path / "data", rows, vocab_size=50)
    trainer = FusionTrainer(tiny_model(), config(tmp_path / "t"), eval_dataset={"one": rows[:3], "all": rows})
    expected = trainer.evaluate(rows)["eval_loss"]
    for data in (made, str(made)):
        assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-3)  # as stored: float16
        assert trainer.predict(data).metrics["test_loss"] == pytest.approx(expected, rel=1e-3)
    assert trainer.evaluate()["eval_all_loss"] == pytest.approx(expected)
