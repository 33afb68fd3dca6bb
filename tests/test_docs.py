"""README and docs against what is there: links, files, commands, flags, and the figures of the README."""

import json
import logging
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusechat_fuse
from fusechat_fuse.cli import main, parser_of
from fusechat_fuse.commands import COMMANDS
from fusechat_fuse.store.shards import load_representation
from fusechat_merge.cli import _parser as merge_parser
from tests.helpers.real_tokenizers import tiny_bpe, tiny_unigram
from tests.helpers.tiny_models import tiny_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^[ ]*```{language}\n(.*?)^[ ]*```", page.read_text(), re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[list[str]]:
    """The words of every command in the page's shell blocks, comments and assignments before them left out."""
    found = []
    for block in blocks(page, "bash"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            for part in re.split(r"\s&&\s|\s\|\s", line):
                words = shlex.split(part.replace("[", "").replace("]", ""), comments=True)
                while words and "=" in words[0]:
                    words = words[1:]
                if words:
                    found.append(words)
    return found


def of_program(name: str) -> list:
    return [
        pytest.param(words, id=" ".join(words)[:80])
        for page in PAGES
        for words in command_lines(page)
        if words[0] == name
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links {target}"
    for path in re.findall(r"`((?:examples|tests|docs|mergekit_configs|fusechat_fuse|fusechat_merge)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for module in re.findall(r"python -m (tests\.[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page.name} runs {module}"
    for script in re.findall(r"python3? ((?:examples|tests)/[\w./-]+\.py)", text):
        assert (ROOT / script).exists(), f"{page.name} runs {script}"


@pytest.mark.parametrize("words", of_program("fusechat-fuse"))
def test_commands_of_fusechat_fuse_exist_with_their_flags(words):
    assert words[1] in COMMANDS
    parser = parser_of(words[1])
    unknown = [word for word in words[2:] if word.startswith("--") and word.split("=")[0] not in parser.flags]
    assert not unknown


@pytest.mark.parametrize("words", of_program("fusechat-merge"))
def test_commands_of_fusechat_merge_exist(words):
    commands = next(action.choices for action in merge_parser()._actions if isinstance(action.choices, dict))
    assert words[1] in commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_text_are_flags_of_some_command(page):
    """Inline code that is a flag, where the page is about our commands."""
    known = {"--help", "--help-all", "--version", "--quiet", "--cuda", "--device", "--output", "--lora_merge_cache"}
    for name in COMMANDS:
        known |= set(parser_of(name).flags)
    if page.name in ("from-fuseai.md", "benchmarks.md", "CONTRIBUTING.md"):  # other programs' flags
        return
    found = set(re.findall(r"`(--[a-z_0-9-]+)", page.read_text()))
    of_vllm = {"--max-logprobs", "--no-enable-prefix-caching"}
    others = {*of_vllm, "--conversations", "--regime", "--config_file"}  # of benchmarks and examples, of accelerate
    assert not found - known - others


def test_the_readmes_figures_stand_on_the_page_that_has_their_commands():
    readme = (ROOT / "README.md").read_text()
    sources = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
    sources += "".join(file.read_text() for file in sorted((ROOT / "examples/results").glob("*.md")))
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    figures = {figure for row in rows for figure in re.findall(r"-?\d+\.\d+", row)}
    assert len(figures) > 10
    assert not {figure for figure in figures if figure not in sources}


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}  # the site's own first page
    assert not {page for page in pages if f"docs/{page}" not in readme}


@pytest.fixture
def in_readmes_place(tmp_path, monkeypatch):
    """Tiny models and chats under the names of README and docs/pipeline.md; /models is the directory itself."""
    monkeypatch.chdir(tmp_path)
    for names, family, tokenizer in (("pivot", "Llama", tiny_bpe()), ("source", "Mistral", tiny_unigram())):
        model = tiny_model(family, vocab_size=len(tokenizer) + 8)
        for name in (names.upper(), names, f"{names}-a", f"{names}-b"):
            model.save_pretrained(name)
            tokenizer.save_pretrained(name)
    for seed, name in enumerate(("target-a", "target-b"), start=1):
        tiny_model("Llama", seed=seed, vocab_size=len(tiny_bpe()) + 8).save_pretrained(name)
    chats = [{"id": str(n), "prompt": f"say {n}", "completion": f"the {n} is"} for n in range(8)]
    (shown,) = re.findall(r'`(\{"messages".*?\})`', (ROOT / "README.md").read_text())
    chats.append(json.loads(shown))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return tmp_path


@pytest.mark.slow
def test_the_readmes_configurations_are_taken_as_they_stand(in_readmes_place, caplog, capsys):
    recipe, merge = (text.replace("/models", f"{in_readmes_place}") for text in blocks(ROOT / "README.md", "yaml"))
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(merge)), "merged", MergeOptions())
    assert AutoModelForCausalLM.from_pretrained("merged").dtype == torch.bfloat16
    Path("recipe.yml").write_text(recipe)
    with caplog.at_level(logging.INFO):
        assert main(["run", "recipe.yml", "--dry_run"]) == 0
    commands = caplog.text
    expected = {"represent": 6, "assign": 1, "answer": 2}  # the data, and the sources' answers to them
    expected |= {"align": 2, "combine": 1, "train": 4}  # plain, a target each, multi
    for command, times in expected.items():
        assert len(re.findall(rf"fusechat_fuse {command} ", commands)) == times, commands
    assert main(["plan", "recipe.yml", "--gpu", "h100"]) == 0
    assert "multi" in capsys.readouterr().out


@pytest.mark.slow
def test_the_stages_and_the_readmes_python_run_as_they_stand(in_readmes_place):
    stages = [words[1:] for words in command_lines(ROOT / "docs/pipeline.md") if words[0] == "fusechat-fuse"]
    stages = [words for words in stages if words[0] not in ("plan", "run")]
    assert [words[0] for words in stages] == ["represent", "represent", "compare", "align", "train"]
    for words in stages:
        assert main(words) == 0, words
    assert load_representation("r/pivot").manifest["counts"]["conversations"] == 9  # the README's line is one
    model = AutoModelForCausalLM.from_pretrained("PIVOT")
    names = {"model": model, "tokenizer": AutoTokenizer.from_pretrained("PIVOT")}
    (snippet,) = blocks(ROOT / "README.md", "python")
    exec(snippet.replace('FusionConfig("target")', 'FusionConfig("another", num_train_epochs=1)'), names)
    assert names["trainer"].state.global_step == 1


def test_names_of_the_api_page_exist():
    names = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__doc__
    offered = {*fusechat_fuse.__all__} - {name.rpartition(".")[2] for name in names}
    assert not offered


def test_the_readme_can_be_read_to_its_end():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140
