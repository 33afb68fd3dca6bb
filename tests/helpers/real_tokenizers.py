"""Real tokenizers without a hub: built from vocabulary files that PyPI packages carry, plus two tiny trained ones.

`openchat()` is Mistral's first SentencePiece model (package mistral-common) with `<|end_of_turn|>` and `<|pad_0|>`,
`qwen()` Qwen1.5/2 (package dashscope), `llama3()` Llama-3 (package llama-models). Their ids equal the originals'
(`test_real_tokenizers.py` holds that against ids recorded from the released tools). All are plain
`PreTrainedTokenizerFast`, whose pipeline transformers leaves as it is. A build takes seconds, so it is cached on disk.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import tempfile
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

OPENCHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ 'GPT4 Correct ' + message['role'].title() + ': ' "
    "+ message['content'] + '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL_FILE = "mistral_instruct_tokenizer_240323.model.v3"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


@cache
def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _tiktoken_vocabulary(path) -> dict[bytes, int]:
    lines = path.read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts byte-pair encoding has just before it makes `token`: merge by rank, lower ranks only."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
        rank, i = min(candidates)
        if rank >= ranks[token]:
            raise ValueError(f"{token!r} cannot be reached by merges of lower rank")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _byte_level(ranks: dict[bytes, int], split: str, all_splits: bool) -> Tokenizer:
    alphabet = _byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) == 1:
            continue
        if all_splits:
            cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
            pairs = sorted((ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks)
            pairs = [(a, b) for *_, a, b in pairs]
        else:
            pairs = [_last_merge(token, ranks)]
        merges += [(spell(a), spell(b)) for a, b in pairs]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=all_splits))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _special(*contents: str) -> list[AddedToken]:
    return [AddedToken(content, special=True, normalized=False) for content in contents]


def _sentencepiece_bpe(file: str) -> tuple[Tokenizer, list[str]]:
    """A SentencePiece model of mistral-common, without normalizer, and its control pieces."""
    import sentencepiece

    path = files("mistral_common") / "data" / file
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        if model.is_byte(i) or model.is_control(i) or model.is_unknown(i):
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-model.get_score(i), pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0])
    bpe = models.BPE(vocabulary, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer, [piece for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]


def _build_openchat() -> PreTrainedTokenizerFast:
    tokenizer, _ = _sentencepiece_bpe("tokenizer.model.v1")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(_special("<unk>", "<s>", "</s>", "<|end_of_turn|>", "<|pad_0|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end_of_turn|>",
        pad_token="<|pad_0|>",
        chat_template=OPENCHAT_TEMPLATE,
    )


def _build_mistral() -> PreTrainedTokenizerFast:
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template

    tokenizer, control = _sentencepiece_bpe(MISTRAL_FILE)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(_special(*control))
    template = convert_tokenizer_to_chat_template(str(files("mistral_common") / "data" / MISTRAL_FILE))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def _build_qwen() -> PreTrainedTokenizerFast:
    ranks = _tiktoken_vocabulary(files("dashscope") / "resources" / "qwen.tiktoken")
    tokenizer = _byte_level(ranks, QWEN_SPLIT, all_splits=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
    )


def _build_llama3() -> PreTrainedTokenizerFast:
    ranks = _tiktoken_vocabulary(files("llama_models") / "llama3" / "tokenizer.model")
    tokenizer = _byte_level(ranks, LLAMA3_SPLIT, all_splits=True)
    names = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{n}" for n in range(4))]
    names += ["start_header_id", "end_header_id", "reserved_special_token_4", "eot_id"]
    names += [f"reserved_special_token_{n}" for n in range(5, 251)]
    tokenizer.add_special_tokens(_special(*(f"<|{name}|>" for name in names)))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", 128000)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        chat_template=LLAMA3_TEMPLATE,
    )


def _cached(name: str, package: str, build) -> PreTrainedTokenizerFast:
    recipe = Path(__file__).read_bytes() + version(package).encode() + version("tokenizers").encode()
    folder = (
        Path(tempfile.gettempdir()) / f"fusechat-tokenizers-{os.getuid()}" / hashlib.sha256(recipe).hexdigest()[:16]
    )
    if not (folder / name).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder))
        build().save_pretrained(staging)
        with contextlib.suppress(OSError):  # another process was faster
            staging.rename(folder / name)
    return PreTrainedTokenizerFast.from_pretrained(folder / name)


def openchat() -> PreTrainedTokenizerFast:
    """OpenChat-3.5's tokenizer: 32,002 ids, SentencePiece BPE with byte fallback, legacy '▁' after special tokens."""
    return _cached("openchat", "mistral-common", _build_openchat)


def mistral() -> PreTrainedTokenizerFast:
    """Mistral-7B-Instruct-v0.3's tokenizer: 32,768 ids, with marks of tool calls; chat template of mistral-common."""
    return _cached("mistral", "mistral-common", _build_mistral)


def qwen() -> PreTrainedTokenizerFast:
    """Qwen1.5/Qwen2's tokenizer: 151,646 ids, byte-level BPE behind NFC."""
    return _cached("qwen", "dashscope", _build_qwen)


def llama3() -> PreTrainedTokenizerFast:
    """Llama-3's tokenizer: 128,256 ids, byte-level BPE that takes whole words from the vocabulary first."""
    return _cached("llama3", "llama-models", _build_llama3)


def tiny_corpus() -> list[str]:
    """A few hundred lines of text that comes with Python."""
    import pydoc_data.topics

    return [
        line for topic in sorted(pydoc_data.topics.topics) for line in pydoc_data.topics.topics[topic].split("\n\n")
    ]


@cache
def _tiny_bpe_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_corpus()[:400], trainer)
    return tokenizer.to_str()


@cache
def _tiny_unigram_json() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", "<|end|>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(tiny_corpus()[:400], trainer)
    data = json.loads(tokenizer.to_str())
    data["model"]["byte_fallback"] = True
    known = {piece for piece, _ in data["model"]["vocab"]}
    data["model"]["vocab"] += [[f"<0x{b:02X}>", -20.0] for b in range(256) if f"<0x{b:02X}>" not in known]
    data["decoder"] = {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, data["decoder"]],
    }
    return json.dumps(data)


def tiny_bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 ids with ChatML's special tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tiny_bpe_json()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
    )


def tiny_unigram() -> PreTrainedTokenizerFast:
    """A SentencePiece-style Unigram model with byte fallback and '▁' before the first word."""
    template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '[' + message['role'] + '] ' + message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tiny_unigram_json()),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="</s>",
        chat_template=template,
    )
