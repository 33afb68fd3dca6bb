"""A pivot directory and aligned data on disk, tiny, for tests of whole training runs."""

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers

from fusechat_fuse.store.shard_writer import ShardWriter
from fusechat_fuse.store.tokenizers import save_tokenizer
from fusechat_fuse.text.tokens import tokenizer_hash
from fusechat_fuse.training.config import FusionConfig
from fusechat_fuse.training.trainer import FusionTrainer
from tests.helpers import real_tokenizers
from tests.helpers.fusion_rows import aligned_rows
from tests.helpers.tiny_models import tiny_model


@functools.cache
def tokenizer():
    return real_tokenizers.tiny_bpe()


VOCAB = 640  # padded beyond the tokenizer's ids, as real embeddings are


def pivot_directory(path: Path, seed: int = 0, **changes) -> Path:
    model = tiny_model("Llama", seed=seed, vocab_size=VOCAB, **changes)
    model.generation_config = transformers.GenerationConfig(eos_token_id=[2, 5], temperature=0.7, do_sample=True)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def aligned_directory(path: Path, rows=None, *, count=24, seed=0, kind="aligned", vocab_size=VOCAB, **manifest) -> Path:
    rows = aligned_rows(count, seed=seed, vocab_size=500) if rows is None else rows
    writer = ShardWriter(path, {"rows": len(rows), "seed": seed}, kind=kind)
    half = len(rows) // 2
    writer.write(0, rows[:half])
    writer.write(1, rows[half:])
    save_tokenizer(tokenizer(), path)
    writer.finish(
        2,
        {
            "model": {"name": "pivot", "vocab_size": vocab_size},
            "tokenizer": {"sha256": tokenizer_hash(tokenizer())},
            "source": {"model": "strong-source"},
            "options": {"mapping": "prefix"},
            "certificate": {"all": {"coverage": 0.93, "gap_bits_per_byte": 0.0}},
            **manifest,
        },
    )
    return path


def config(output, **changes) -> FusionConfig:
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return FusionConfig(str(output), **{**options, **changes})


def logged(output: Path, name: str = "loss") -> list[float]:
    """The values of one figure, step by step, as the run wrote them."""
    history = json.loads((Path(output) / "trainer_state.json").read_bytes())["log_history"]
    return [entry[name] for entry in history if name in entry]


def run(tmp_path, rows, model=None, trainer_options=None, **changes):
    """Train in the order of `rows`: (losses by step, parameters after training, trainer)."""
    model = tiny_model() if model is None else model
    settings = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "warmup_steps": 0, **changes}
    trainer = FusionTrainer(model, config(tmp_path, **settings), train_dataset=rows, **(trainer_options or {}))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, trainer


def assert_same_run(a, b, tolerance=1e-5):
    assert a[0] == pytest.approx(b[0], rel=tolerance)
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=tolerance, atol=tolerance)
