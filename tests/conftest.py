"""Offline, on the CPU, one thread; tokenizers, tiny models and a server of forked processes as session fixtures."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import pytest

from tests.helpers import real_tokenizers

SLOWEST = ("test_examples.py", "test_quickstart.py", "test_pipeline.py", "test_merge_install.py", "test_docs.py")


def pytest_configure(config):
    """`-n 2 --dist loadfile` hands out files in the order below, not by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Files of minutes first, so that two workers end together."""
    items.sort(key=lambda item: item.path.name not in SLOWEST)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_not_garbage():
    """A full collection, which accelerate makes before every training, takes seconds over all that torch brings."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _threads_restored():
    """A test may set torch's threads; the next one finds them as they were."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture
def one_thread():
    """One torch thread: sums in one order, so results compare bit for bit."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def openchat():
    """Mistral's SentencePiece vocabulary with OpenChat's added tokens: metaspace, byte fallback."""
    return real_tokenizers.openchat()


@pytest.fixture(scope="session")
def qwen():
    """Qwen's byte-level BPE with NFC normalization."""
    return real_tokenizers.qwen()


@pytest.fixture(scope="session")
def llama3():
    """Llama-3's byte-level BPE."""
    return real_tokenizers.llama3()


@pytest.fixture(scope="session")
def tiny_bpe():
    """A trained byte-level BPE of a few hundred entries, Llama-3-like."""
    return real_tokenizers.tiny_bpe()


@pytest.fixture(scope="session")
def tiny_unigram():
    """A trained Unigram tokenizer of a few hundred entries, with byte fallback."""
    return real_tokenizers.tiny_unigram()


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """Runs Python commands as processes that need not import torch, see helpers/fork_server.py."""
    from tests.helpers.fork_server import ForkServer

    server = ForkServer(tmp_path_factory.mktemp("forked"))
    yield server
    server.stop()


@pytest.fixture
def forked_commands(forked, monkeypatch):
    """All Python commands that a test or the code under test starts are forked."""
    monkeypatch.setattr("subprocess.Popen", forked.Popen)
    return forked


@pytest.fixture(scope="session")
def recipe_models(tmp_path_factory):
    """Tiny models and chat data on disk, for recipes."""
    from tests.helpers.recipes import save_models

    return save_models(tmp_path_factory.mktemp("recipe-models"))
