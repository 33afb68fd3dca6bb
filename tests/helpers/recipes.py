"""Recipes of tiny models, for `run` and `plan`."""

import json
import subprocess
import time
from pathlib import Path

import yaml

from tests.helpers.real_tokenizers import tiny_bpe, tiny_unigram
from tests.helpers.tiny_models import tiny_model

CHATS = [
    {"id": f"c{n}", "conversations": [{"from": "human", "value": f"say {n}"}, {"from": "gpt", "value": f"the {n} is"}]}
    for n in range(24)
]
PLAIN = {"output_dir": "out", "pivot": "p", "sources": {"a": "one", "b": "two"}, "data": "d.json"}


def written(folder: Path, **changes) -> Path:
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump({**PLAIN, **changes}, sort_keys=False))
    return file


def save_models(home: Path) -> Path:
    """A pivot, two sources, chat data for training and held out."""
    for name, family, tokenizer, seed in (
        ("pivot", "Llama", tiny_bpe(), 0),
        ("one", "Mistral", tiny_unigram(), 1),
        ("two", "Llama", tiny_bpe(), 2),
    ):
        tiny_model(family, seed=seed, vocab_size=len(tokenizer) + 8).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    (home / "chats.json").write_text(json.dumps(CHATS))
    (home / "held.json").write_text(json.dumps([{**chat, "id": f"h{n}"} for n, chat in enumerate(CHATS[:6])]))
    return home


def recipe_of(models: Path, folder: Path, sources: tuple, **changes) -> Path:
    train = {"max_steps": 3, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    entries = {
        "output_dir": str(folder / "out"),
        "pivot": str(models / "pivot"),
        "sources": {name: str(models / name) for name in sources},
        "data": str(models / "chats.json"),
        "represent": {"template": "native", "dtype": "float32"},
        "align": {"cache_dir": str(models / "cache")},
        "train": train,
        "targets": "all",  # what tiny models serve is chance
        **changes,
    }
    return written(folder, **entries)


def kill_in_step(forked, command: list[str], log: Path, seconds: float) -> None:
    """Start a run, and kill it some seconds after the step with this log has begun."""
    process = forked.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.wait()
    forked.wait_until_idle()
