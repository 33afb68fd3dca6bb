"""The pivot as files: configuration, tokenizer, weights; and whether data was aligned to it."""

import logging
import shutil
from functools import cached_property
from pathlib import Path

from fusechat_fuse.errors import InputError
from fusechat_fuse.models.files import load_config, load_fast_tokenizer, model_file
from fusechat_fuse.models.identity import identify
from fusechat_fuse.models.loading import load_model
from fusechat_fuse.store.shards import Representation
from fusechat_fuse.store.tokenizers import read_tokenizer
from fusechat_fuse.text.tokens import same_vocabulary, tokenizer_hash

logger = logging.getLogger(__name__)
# Copied as they are: saving a tokenizer anew with another version of transformers can change its ids.
OWN_FILES = """
    tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt chat_template.jinja chat_template.json generation_config.json tekken.json
""".split()


class PivotFiles:
    """A model directory or Hub name, read piece by piece; weights only by `load_model`.

    Raises: InputError where there is no model.
    """

    def __init__(self, name: str, *, trust_remote_code: bool = False):
        self.name, self.trust_remote_code = name, trust_remote_code
        self.config = load_config(name, trust_remote_code=trust_remote_code)

    @cached_property
    def tokenizer(self):
        """The fast tokenizer, as its tokenizer.json says where it has one."""
        return load_fast_tokenizer(self.name, self.trust_remote_code)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the model, as representations record it."""
        return identify(self.name)["fingerprint"]

    def load_model(self, **loading):
        """The causal language model with its weights, as `loading.load_model` takes `loading`."""
        return load_model(self.name, trust_remote_code=self.trust_remote_code, **loading)

    def check_data(self, data: Representation) -> None:
        """Raise InputError unless the pivot of aligned or combined data has this model's vocabulary."""
        made_with = data.manifest.get("model") or {}
        there, rows = made_with.get("vocab_size"), self.config.get_text_config().vocab_size
        if there and there > rows:
            raise InputError(
                f"vocabulary for {data.path}: expected ids below {rows} (rows of {self.name}), got data of "
                f"a pivot with {there}. Train the pivot that the data was aligned to."
            )
        hashed = data.manifest["tokenizer"]["sha256"]
        if (fingerprint := made_with.get("fingerprint")) not in (None, self.fingerprint):
            logger.warning(
                "%s holds the distributions of another pivot (%s there, %s here) with a like vocabulary.",
                data.path,
                fingerprint,
                self.fingerprint,
            )
        if hashed == tokenizer_hash(self.tokenizer):
            return
        if (Path(data.path) / "tokenizer").is_dir() and same_vocabulary(self.tokenizer, read_tokenizer(data)):
            return
        raise InputError(
            f"tokenizer for {data.path}: expected the one of {self.name}, got data of another (hash {hashed[:8]}, "
            f"here {tokenizer_hash(self.tokenizer)[:8]}). Align to this pivot, or train the pivot of the data."
        )

    def copy_files(self, output: Path) -> None:
        """Put the pivot's own tokenizer files, chat template and generation config into the target directory."""
        for name in OWN_FILES:
            file = model_file(self.name, name)
            if file is not None and file.resolve() != (output / name).resolve():
                shutil.copyfile(file, output / name)
