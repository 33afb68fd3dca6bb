"""The pictures of these pages: from the quickstart's output the inspect page, the report, a merge's coefficients; from
two tiny models with the vocabularies of Llama 3 and Qwen, which have read some sums, how numbers are aligned.

    python examples/quickstart.py && fusechat-fuse run quickstart-output/recipe.yml && python docs/screenshots.py

Needs chromium and the extra `test`; writes docs/images, under 1 MB together.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from fusechat_fuse import align, represent
from fusechat_fuse.text.chat import ConversationEncoder
from fusechat_fuse.text.templates import resolve_template

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.helpers import real_tokenizers

IMAGES = Path(__file__).parent / "images"
SUMS = [(first, second) for first in range(104, 124) for second in (86, 88, 97)]


def photograph(page: Path, name: str, height: int) -> None:
    """The first `height` pixels of a page, in 128 colours."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "page.png")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1100,{height}"]
        command = ["chromium", *flags, f"--screenshot={raw}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        compress(raw, name)


def compress(picture: Path, name: str) -> None:
    """A picture at most 1100 pixels wide, in 128 colours."""
    with Image.open(picture) as image:
        image.thumbnail((1100, 2000))
        image.convert("RGB").quantize(128).save(IMAGES / f"{name}.png", optimize=True)


def messages_of(first: int, second: int) -> list[dict[str, str]]:
    question, answer = f"{first} + {second} =", str(first + second)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def teach_sums(tokenizer, pivot, folder: Path) -> None:
    """A model that has read the sums a few times: enough to hesitate between sensible digits."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    encoder = ConversationEncoder(tokenizer, resolve_template("pivot", tokenizer, pivot))
    rows = [torch.tensor(encoder.encode(messages_of(*numbers)).input_ids[None]).long() for numbers in SUMS]
    for n in torch.randperm(len(rows)).tolist() * 6:
        model(input_ids=rows[n], labels=rows[n]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def aligned_sum(work: Path) -> Path:
    """Aligned data of one sum, whose result is three tokens of the pivot and one of the source."""
    pivot, source = real_tokenizers.qwen(), real_tokenizers.llama3()
    for name, tokenizer in (("qwen", pivot), ("llama3", source)):
        teach_sums(tokenizer, pivot, work / name)
        rows = [{"id": "113 + 88", "messages": messages_of(113, 88)}]
        represent(work / name, rows, work / f"r-{name}", pivot=str(work / "qwen"))
    align(work / "r-qwen", work / "r-llama3", work / "aligned")
    return work / "aligned"


def inspect(aligned: Path, row: str, name: str, height: int) -> None:
    """The page of one conversation."""
    with tempfile.TemporaryDirectory() as work:
        page = Path(work, "page.html")
        command = ["fusechat-fuse", "inspect", str(aligned), "--row", row, "--html", str(page)]
        subprocess.run(command, check=True, capture_output=True)
        photograph(page, name, height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart-output"), help="what the quickstart wrote")
    parser.add_argument("--row", default="capitals-273", help="conversation of the inspect page")
    folder = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        inspect(aligned_sum(Path(work)), "0", "digits", 900)
    inspect(folder.quickstart / "aligned" / "fusechat-words", folder.row, "inspect", 900)
    photograph(folder.quickstart / "run" / "report.html", "report", 930)
    compress(min((folder.quickstart / "run" / "merged" / "reports").rglob("coefficients.png")), "coefficients")


if __name__ == "__main__":
    main()
