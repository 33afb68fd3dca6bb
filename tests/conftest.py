"""Offline, on the CPU, two threads; the tokenizers of `real_tokenizers.py` as session fixtures."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest

from tests.helpers import real_tokenizers


def _fixture(name):
    @pytest.fixture(scope="session", name=name)
    def fixture():
        return getattr(real_tokenizers, name)()

    return fixture


for _name in ("openchat", "qwen", "llama3", "tiny_bpe", "tiny_unigram"):
    globals()[_name] = _fixture(_name)
