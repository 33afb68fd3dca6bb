"""The tokenizers that the tests build are the originals: ids recorded from the authors' released code."""

import json
from pathlib import Path

import pytest

from tests.helpers import real_tokenizers

GOLDEN = json.loads((Path(__file__).parent / "golden" / "inputs.json").read_text())


@pytest.mark.parametrize("name", ["openchat", "qwen", "llama3"])
def test_ids_equal_the_originals(name):
    tokenizer = getattr(real_tokenizers, name)()
    for sample, record in GOLDEN[name].items():
        assert tokenizer(record["text"]).input_ids == record["input_ids"], sample


def test_model_card_ids_single_turn(openchat):
    expected = [1, 420, 6316, 28781, 3198, 3123, 1247, 28747, 22557, 32000, 420, 6316, 28781, 3198, 3123, 21631, 28747]
    assert openchat("GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant:").input_ids == expected


def test_model_card_ids_multi_turn(openchat):
    user, assistant = [420, 6316, 28781, 3198, 3123, 1247, 28747], [420, 6316, 28781, 3198, 3123, 21631, 28747]
    turns = [user, [22557, 32000], assistant, [15359, 32000], user, [1602, 460, 368, 3154, 28804, 32000], assistant]
    expected = [1, *(token for turn in turns for token in turn)]
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "How are you today?"},
    ]
    text = (
        "GPT4 Correct User: Hello<|end_of_turn|>GPT4 Correct Assistant: Hi<|end_of_turn|>"
        "GPT4 Correct User: How are you today?<|end_of_turn|>GPT4 Correct Assistant:"
    )
    assert openchat(text).input_ids == expected
    assert openchat.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == expected
