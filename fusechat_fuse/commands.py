"""The subcommands of `fusechat-fuse`: the function of the library that each one calls, and the help texts of its flags.

Types and defaults of the flags are the function's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

PRESET = "settings where a flag names a preset: fusechat (ours) or paper (FuseChat's)"
OUTPUT = "directory of the result: new, or an interrupted run's, which is continued"
TRUST = "run code that comes with the model"
LOADING = {
    "dtype": "precision of the weights: auto (as in the checkpoint), float32, bfloat16 or float16",
    "device_map": "placement of the model; auto: spread over several GPUs",
    "attn_implementation": "attention kernel: eager, sdpa, flash_attention_2, ...",
    "gguf_file": "GGUF file in the model's directory or repository; without a model: its path",
    "load_in_4bit": "quantise the weights to 4 bits while loading (bitsandbytes, NF4)",
    "load_in_8bit": "quantise the weights to 8 bits while loading (bitsandbytes)",
    "trust_remote_code": TRUST,
}
SERVERS = {
    "server": "URL[,URL] of inference servers that run the model instead of this process (API key: the environment "
    "variable FUSECHAT_SERVER_API_KEY)",
    "server_kind": "kind of the servers: vllm or sglang",
    "server_model": "name of the served model, if a server has several (such as adapters)",
    "server_requests": "concurrent requests to each server",
}
READING = {
    "split": "split to read",
    "limit": "stop after this number of usable conversations",
    "shuffle_seed": "shuffle the conversations with this seed, before --limit counts them",
    "messages_column": "column with the messages, if not `messages` or `conversations`",
    "strict": "treat rows that would be skipped or repaired as errors",
}
SHARD = "conversations per shard (the most that are computed again if the run is killed)"
SLICES = "slice (named in the data, else as auto), auto (clusters of the prompts) or none (the data set as a whole)"
SLICE_PATTERN = "regular expression that takes the slice's name from the id instead"
ENCODING = "format on disk: plain, or compact (under 40 bytes per predicted token)"


@dataclass(frozen=True)
class Command:
    """A subcommand around one function of the library.

    Attributes:
        what: what it does, in a sentence.
        function: `module.name` below fusechat_fuse.
        example: one whole command line, without the program.
        help_texts: by section: flag -> help text ("NAME ..." takes several values, capitals are positional).
        parameters: flag -> the function's parameter, where the two differ.
        text_of: what is printed of the result; None: the result itself.
        check: `module.name` of what raises InputError for parameters that are wrong in themselves, before any work.
    """

    what: str
    function: str
    example: str
    help_texts: dict[str, dict[str, str]]
    parameters: dict[str, str] = field(default_factory=dict)
    text_of: Callable[[Any], Any] | None = None
    check: str | None = None


def library(name: str) -> Any:
    """The object `module.name` below fusechat_fuse, imported when it is needed."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(f"fusechat_fuse.{module}"), attribute)


def _lines(function: str, result) -> str:
    return "\n".join(library(function)(result))


COMMANDS = {
    "run": Command(
        "Run a whole recipe: every stage below, the merges and a report.",
        "pipeline.run.run",
        "run recipe.yml",
        {
            "input and output": {
                "RECIPE.yml": "models, data and options of the whole fusion",
                "only": "the one stage to run: answer, represent, compare, align, combine, train, merge, evaluate, "
                "report",
                "from": "the first stage to run; the results of earlier stages must be there",
                "overwrite ...": "stages whose steps start anew if their options, inputs or output have changed",
                "dry_run": "print what would run and its commands, without running them",
            }
        },
        parameters={"RECIPE.yml": "recipe", "from": "start"},
        text_of=lambda record: None,
    ),
    "plan": Command(
        "Show what a recipe costs, and which of its steps will fail, before anything runs.",
        "pipeline.plan.plan",
        "plan recipe.yml --gpu h100",
        {
            "input and output": {
                "RECIPE.yml": "recipe, as `run` takes it",
                "gpu": "GPU whose memory and times are planned: v100, a10, a100-40, a100, rtx4090, l40s, h100, h200 or "
                "b200 (default: none, main memory)",
                "sample": "conversations encoded of each data set; counts are exact if it has no more",
            }
        },
        parameters={"RECIPE.yml": "recipe"},
        text_of=lambda found: _lines("pipeline.plan_text.plan_lines", found),
    ),
    "represent": Command(
        "Run a model once over chat data and store its top-k next-token distributions.",
        "capture.run.represent",
        "represent --model_name_or_path SOURCE --pivot_name_or_path PIVOT --data_path chats.jsonl --output_dir "
        "representations/source",
        {
            "input and output": {
                "model_name_or_path": "model to run: a directory (of adapters, too), Hub name or GGUF file",
                "data_path ...": "chat data: JSON or JSONL (also .gz, .zst), Parquet, globs, directories or Hub names, "
                "several at once",
                "output_dir": OUTPUT,
                "pivot_name_or_path": "pivot whose chat template is used by --template pivot",
                "template": "chat template: pivot, native (the model's own), the name of a built-in one or a .jinja "
                "file",
            },
            "what is stored": {
                "top_k": "candidates stored per predicted token",
                "max_length": "tokens kept of a conversation",
                "encoding": ENCODING,
                "shard_size": SHARD,
                "tokens_per_batch": "padded tokens of one forward pass; halved when memory runs out",
            },
            "loading the model": LOADING,
            "inference servers": SERVERS,
            "reading the data": READING,
        },
        parameters={"model_name_or_path": "model", "data_path": "conversations", "pivot_name_or_path": "pivot"},
        text_of=lambda representation: representation.manifest["counts"],
        check="capture.run.check_options",
    ),
    "import": Command(
        "Import distributions that others released or captured: a model's own, or aligned ones.",
        "capture.released.import_released",
        "import RELEASED --model_name_or_path TOKENIZER --output_dir representations/source",
        {
            "input and output": {
                "RELEASED ...": "data sets with per_step_logits, saved to disk; a DistillKit capture (parquet); JSON "
                "lines of vLLM's or SGLang's answers with log-probabilities of the prompt",
                "model_name_or_path": "tokenizer that made the ids (the pivot's, if they are aligned)",
                "output_dir": OUTPUT,
                "template": "chat template: native (the tokenizer's own), the name of a built-in one, text (none) or a "
                ".jinja file",
                "source_number": "number of the source to import, where FuseLLM's columns end in several",
                "top_k": "entries to keep per token of a capture that has more",
                "max_length": "tokens to which the conversations were cut",
                "shard_size": SHARD,
                "encoding": ENCODING,
                "trust_remote_code": "run code that comes with the tokenizer",
            }
        },
        parameters={"RELEASED": "released"},
        text_of=lambda representation: {**representation.manifest["counts"], **representation.manifest["released"]},
    ),
    "compare": Command(
        "Compare models on the same conversations: bits per byte by slice of the data.",
        "evaluation.comparison.compare",
        "compare representations/pivot representations/source --output_dir comparison",
        {
            "input and output": {
                "R ...": "two or more directories that represent wrote, the pivot's first",
                "output_dir": "directory for compare.json, compare.md and compare.png (default: none)",
                "slice_column": SLICES,
                "slice_pattern": SLICE_PATTERN,
                "baseline": "of held-out results of one pivot: the R that the others are compared to",
            },
            "held-out results (with --baseline)": {
                "source_answers ...": "the same models' representations of the same prompts with the sources' answers, "
                "which rank them",
                "answers ...": "the same models' answers to the same prompts (answer --benchmark held_out)",
                "score": "score of these answers, which ranks the models: exact_match, or FILE.py:function of (answer, "
                "reference, row) that returns 0 to 1",
            },
        },
        parameters={"R": "representation_dirs"},
        text_of=lambda result: _lines("evaluation.comparison.table_lines", result),
    ),
    "assign": Command(
        "Divide chat data among pivot and sources, by the model that is selected for each slice.",
        "evaluation.assignment.assign",
        "assign representations/pivot representations/source --data_path chats.jsonl --output_dir assigned",
        {
            "input and output": {
                "R ...": "two or more directories that represent wrote, the pivot's first",
                "data_path ...": "chat data that was represented",
                "output_dir": "directory for a file of conversations for each R, and assignment.json",
            },
            "slices": {
                "slice_column": "slices: slice (named in the data, else as auto), auto (clusters of prompts) or none",
                "slice_pattern": "regular expression that takes the slice's name from the id instead",
            },
            "reading the data": READING,
        },
        parameters={"R": "representation_dirs", "data_path": "conversations"},
        text_of=lambda result: result["conversations"],
    ),
    "align": Command(
        "Map a source's distributions to the pivot's tokens and vocabulary.",
        "alignment.run.align",
        "align --pivot_representation representations/pivot --source_representation representations/source "
        "--output_dir aligned/source",
        {
            "input and output": {
                "pivot_representation": "directory that represent wrote for the pivot",
                "source_representation": "directory that represent wrote for the source",
                "output_dir": OUTPUT,
                "cache_dir": "directory for vocabulary maps (default: FUSECHAT_CACHE or ~/.cache/fusechat)",
            },
            "alignment": {
                "mapping": "mapping of candidates to the pivot's vocabulary: exact (EM), min_edit (MinED), "
                "statistics (MS, the paper's choice) or prefix (the source's own next-token probabilities) (preset: "
                "prefix, paper statistics)",
                "preset": PRESET,
                "num_proc": "number of processes (default: 1)",
                "safe_only": "align only positions where no token of either vocabulary could span the start",
                "counts": "counts.safetensors of an earlier corpus, or its directory, for --mapping statistics",
                "fail_under_coverage": "share of predicted tokens below which the run fails, 0 to 1",
            },
        },
        text_of=lambda result: _lines("alignment.certificate.summary_lines", result["certificate"]),
    ),
    "combine": Command(
        "Combine several aligned sources into one.",
        "alignment.combination.combine",
        "combine --aligned aligned/a aligned/b --output_dir combined",
        {
            "input and output": {
                "aligned ...": "two or more directories that align or combine wrote",
                "output_dir": OUTPUT,
            },
            "combination": {
                "function": "rule: min_ce_slice (the best source of each slice), min_ce (of each conversation) or "
                "avg_ce (weighted mean) (preset: min_ce_slice, paper min_ce)",
                "ce_unit": "unit of cross-entropies: byte (comparable between tokenizers) or token (preset: byte, "
                "paper token)",
                "preset": PRESET,
                "slice_column": f"slices for min_ce_slice: {SLICES}",
                "slice_pattern": SLICE_PATTERN,
            },
        },
        parameters={"aligned": "aligned_dirs"},
        text_of=lambda result: _lines("alignment.combination.combination_lines", result),
    ),
    "inspect": Command(
        "Show the content of a representation or an alignment.",
        "inspection.run.inspect_path",
        "inspect aligned/source --row 3 --html page.html",
        {
            "input and output": {
                "PATH": "directory that represent, align or combine wrote",
                "row": "conversation to show: its number or its id",
                "tokens": "predicted tokens to show",
                "html": "file for a self-contained page of this conversation (aligned data)",
                "source_representation": "directory of the source's representation, if it was moved",
            }
        },
        parameters={"PATH": "path"},
    ),
    "train": Command(
        "Fine-tune the pivot on aligned data: one target.",
        "training.run.train",
        "train --model_name_or_path PIVOT --data_path aligned/source --output_dir target",
        {},  # fusechat_fuse.training.options
    ),
    "answer": Command(
        "Answer a benchmark's questions in the format of its judge.",
        "evaluation.answers.answer",
        "answer --benchmark mt_bench --model MERGED --questions question.jsonl --output model_answer/MERGED.jsonl",
        {
            "input and output": {
                "benchmark": "what is answered: mt_bench, alpaca_eval, arena_hard, chat (the last user message of "
                "each conversation), held_out (its last answered turn, to be scored by compare) or data (every turn, "
                "to train on the answers)",
                "model": "model that answers: a directory, Hub name or GGUF file",
                "questions ...": "file of the benchmark's questions; for chat, held_out and data any chat data",
                "output": "file for the answers; for mt_bench and arena_hard model_answer/MODEL_ID.jsonl",
                "pivot_name_or_path": "for data: pivot whose chat template must take the answers; where one is "
                "refused, empty, cut or holds a special token, the data's answers stay",
                "template": "for data: chat template of the pivot, as represent takes it",
            },
            "generation": {
                "temperature": "temperature for all questions; 0 is greedy (default: mt_bench by category, else 0)",
                "samples": "for data: answers to each conversation, as conversations ID#1, ID#2, ...",
                "max_new_tokens": "longest answer in tokens (default: 1024, alpaca_eval 2048, arena_hard 4096)",
                "batch_size": "questions generated at once",
                "seed": "random seed for temperatures above 0",
            },
            "loading the model": LOADING,
            "inference servers": SERVERS,
            "reading chat data": READING,
        },
        parameters={"pivot_name_or_path": "pivot"},
        check="evaluation.answers.check_options",
    ),
}
