"""The pivot as files: configuration, tokenizer, weights; and whether data was aligned to it."""

import logging
import shutil
from functools import cached_property
from pathlib import Path

from fusechat_fuse.errors import InputError
from fusechat_fuse.models import file_fingerprint
from fusechat_fuse.store.shards import Representation
from fusechat_fuse.store.tokenizers import load_tokenizer
from fusechat_fuse.text.tokens import same_vocabulary, tokenizer_hash

logger = logging.getLogger(__name__)
# Copied as they are: saving a tokenizer anew with another version of transformers can change its ids.
OWN_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tekken.json",
)


class PivotFiles:
    """A model directory or Hub name, read piece by piece; weights only by `load_model`.

    Args:
        name: directory or Hub name.
        trust_remote_code: run code that comes with it.
    Raises: InputError where there is no model.
    """

    def __init__(self, name: str, *, trust_remote_code: bool = False):
        from transformers import AutoConfig

        self.name, self.trust_remote_code = name, trust_remote_code
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise InputError(
                f"model for {name}: expected a model directory, got one without config.json. Give the directory that "
                "save_pretrained wrote."
            )
        try:
            self.config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"model for {name}: expected a model directory or a Hub name, got {reason!r} Check the name."
            ) from error

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.get_text_config().vocab_size

    @cached_property
    def tokenizer(self):
        """The fast tokenizer, as its tokenizer.json says where it has one (AutoTokenizer may rebuild it)."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        kind = PreTrainedTokenizerFast if self.file("tokenizer.json") else AutoTokenizer
        options = {} if kind is PreTrainedTokenizerFast else {"trust_remote_code": self.trust_remote_code}
        try:
            return kind.from_pretrained(self.name, **options)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"tokenizer for {self.name}: expected one beside the model, got {reason!r} Copy the pivot's there."
            ) from error

    def file(self, name: str) -> Path | None:
        """A file of the model by name, from the directory or the Hub's cache; None where it has none."""
        if Path(self.name).is_dir():
            path = Path(self.name) / name
            return path if path.is_file() else None
        from transformers.utils import cached_file

        found = cached_file(
            self.name,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return Path(found) if found else None

    def fingerprint(self) -> str:
        """Short hash of the model's files, as representations record it."""
        folder = Path(self.name) if Path(self.name).is_dir() else self.file("config.json").parent
        return file_fingerprint(folder)

    def check_data(self, data: Representation) -> None:
        """Raise InputError unless the data's pivot has this model's vocabulary.

        Args:
            data: aligned or combined data.
        """
        made_with = data.manifest.get("model") or {}
        there = made_with.get("vocab_size")
        if there and there > self.vocab_size:
            raise InputError(
                f"vocabulary for {data.path}: expected ids below {self.vocab_size} (rows of {self.name}), got data of "
                f"a pivot with {there}. Train the pivot that the data was aligned to."
            )
        hashed = data.manifest["tokenizer"]["sha256"]
        if (fingerprint := made_with.get("fingerprint")) not in (None, self.fingerprint()):
            logger.warning(
                "%s holds the distributions of another pivot (%s there, %s here) with a like vocabulary.",
                data.path,
                fingerprint,
                self.fingerprint(),
            )
        if hashed == tokenizer_hash(self.tokenizer):
            return
        if (Path(data.path) / "tokenizer").is_dir() and same_vocabulary(self.tokenizer, load_tokenizer(data.path)):
            return
        raise InputError(
            f"tokenizer for {data.path}: expected the one of {self.name}, got data of another (hash {hashed[:8]}, "
            f"here {tokenizer_hash(self.tokenizer)[:8]}). Align to this pivot, or train the pivot of the data."
        )

    def load_model(self, *, dtype, attn_implementation: str | None = None):
        """The causal language model with weights in `dtype`."""
        from transformers import AutoModelForCausalLM

        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        try:
            return AutoModelForCausalLM.from_pretrained(
                self.name, dtype=dtype, trust_remote_code=self.trust_remote_code, **options
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"weights for {self.name}: expected a causal language model, got {reason!r}") from error

    def copy_files(self, output: Path) -> None:
        """Put the pivot's own tokenizer files, chat template and generation config into the target directory."""
        for name in OWN_FILES:
            file = self.file(name)
            if file is not None and file.resolve() != (output / name).resolve():
                shutil.copyfile(file, output / name)
