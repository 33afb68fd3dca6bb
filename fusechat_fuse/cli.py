"""The command `fusechat-fuse SUBCOMMAND`: flags, configuration files and exit codes around the library's functions.

Each subcommand is one library function; its flags are that function's options. A `--config FILE.yml` gives the same
names as flags would; flags on the command line win, unknown names are errors with a suggestion. Exit codes: 0 done,
1 the run failed, 2 bad arguments or bad input (one sentence on standard error; `--debug` shows the traceback).
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from fusechat_fuse.errors import InputError, as_sentence
from fusechat_fuse.flags import FlagParser, add_flag, unknown
from fusechat_fuse.processes import end_process_group, speaks

# Seconds that the other processes of a launch wait with their errors: the first one's ends the launch, so that what all
# of them find is told once.
FIRST_SPEAKS = 3.0


def _preset_flag(parser: FlagParser) -> None:
    add_flag(parser, "preset", "fusechat", help="where a flag says preset: fusechat (ours) or paper (FuseChat's)")


def _represent_flags(parser: FlagParser) -> None:
    parser.section("what goes in and out")
    add_flag(parser, "model_name_or_path", help="the model to run: a directory (of adapters, too), Hub name, GGUF file")
    add_flag(
        parser,
        "data_path",
        required=True,
        nargs="+",
        help="chat data: JSON, JSONL (.gz), Parquet, globs, directories or Hub names, several at once",
    )
    add_flag(parser, "output_dir", required=True, help="new, or an interrupted run's, which is continued")
    add_flag(parser, "pivot_name_or_path", help="the pivot, whose chat template --template pivot takes")
    add_flag(parser, "template", "pivot", help="pivot, native, a built-in template's name, or a .jinja file")
    parser.section("what is kept")
    add_flag(parser, "top_k", 10, help="tokens kept per predicted token")
    add_flag(parser, "max_length", 2048, help="tokens kept of a conversation")
    add_flag(parser, "encoding", "plain", help="plain, or compact: under 40 bytes per predicted token")
    add_flag(parser, "shard_size", 256, help="conversations per shard, what a kill costs at most")
    add_flag(parser, "tokens_per_batch", 8192, help="padded tokens of one forward pass; halved on out of memory")
    parser.section("how the model is loaded")
    add_flag(parser, "dtype", "auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    add_flag(parser, "device_map", help="auto: one model over several GPUs")
    add_flag(parser, "attn_implementation", help="eager, sdpa, flash_attention_2, ...")
    add_flag(parser, "gguf_file", help="a GGUF file of the model's directory or repository; alone: a path")
    add_flag(parser, "load_in_4bit", False, help="quantise the weights on loading (bitsandbytes, NF4)")
    add_flag(parser, "load_in_8bit", False, help="the same, in 8 bits")
    add_flag(parser, "trust_remote_code", False, help="run code that comes with the model")
    parser.section("inference servers")
    add_flag(parser, "server", help="URL[,URL]: inference servers that run the model, in place of this process")
    add_flag(parser, "server_kind", "vllm", help="vllm or sglang")
    add_flag(parser, "server_requests", 32, help="requests in flight at each server")
    parser.section("how the data are read")
    add_flag(parser, "split", "train", help="of a data set with several")
    add_flag(parser, "limit", type=int, help="read so many usable conversations")
    add_flag(parser, "shuffle_seed", type=int, help="shuffle the conversations by it, before the limit counts")
    add_flag(parser, "messages_column", help="holds the messages, where it is not messages or conversations")
    add_flag(parser, "strict", False, help="rows that would be skipped or repaired are errors")


def _represent(options: dict[str, Any]) -> None:
    from fusechat_fuse import represent

    if options["model_name_or_path"] is None and options["gguf_file"] is None:
        raise InputError("the following arguments are required: --model_name_or_path or --gguf_file.")
    names = {"model_name_or_path": "model", "data_path": "conversations", "pivot_name_or_path": "pivot"}
    result = represent(**{names.get(name, name): value for name, value in options.items()})
    _say(result.manifest["counts"])
    end_process_group()


def _import_flags(parser: FlagParser) -> None:
    parser.add_argument("released", metavar="RELEASED", nargs="+", help="data sets with per_step_logits, saved to disk")
    add_flag(
        parser, "model_name_or_path", required=True, help="the tokenizer that made the ids (the pivot's, if aligned)"
    )
    add_flag(parser, "output_dir", required=True, help="new, or an interrupted run's, which is continued")
    add_flag(parser, "template", "native", help="native, a built-in template's name, or a .jinja file")
    add_flag(parser, "max_length", 2048, help="tokens to which conversations were cut")
    add_flag(parser, "shard_size", 256, help="conversations per shard")
    add_flag(parser, "encoding", "plain", help="plain, or compact: under 40 bytes per predicted token")
    add_flag(parser, "trust_remote_code", False, help="run code that comes with the tokenizer")


def _import(options: dict[str, Any]) -> None:
    from fusechat_fuse import import_released

    manifest = import_released(**options).manifest
    _say({**manifest["counts"], **manifest["released"]})


def _compare_flags(parser: FlagParser) -> None:
    parser.add_argument("representations", metavar="R", nargs="+", help="two or more directories that represent wrote")
    add_flag(parser, "output_dir", help="where compare.json, compare.md and compare.png go (default: nowhere)")


def _compare(options: dict[str, Any]) -> None:
    from fusechat_fuse import compare
    from fusechat_fuse.evaluation.comparison import table_lines

    _say("\n".join(table_lines(compare(options.pop("representations"), **options))))


def _align_flags(parser: FlagParser) -> None:
    from fusechat_fuse.alignment.mappings import MAPPINGS

    known = ", ".join(f"{mapping.name} ({mapping.summary})" for mapping in MAPPINGS.values())
    add_flag(parser, "pivot_representation", required=True, help="directory that represent wrote for the pivot")
    add_flag(parser, "source_representation", required=True, help="directory that represent wrote for the source")
    add_flag(parser, "output_dir", required=True, help="new, or an interrupted run's, which is continued")
    add_flag(parser, "mapping", help=f"{known} (preset: prefix, paper statistics)")
    _preset_flag(parser)
    add_flag(parser, "num_proc", type=int, help="processes (default: one)")
    add_flag(parser, "safe_only", False, help="answer only where no token of either vocabulary could span the start")
    add_flag(parser, "counts", help="counts of an earlier corpus, for statistics")
    add_flag(parser, "fail_under_coverage", type=float, help="least share of predicted tokens that must have an answer")
    add_flag(parser, "cache_dir", help="where vocabulary maps are kept (default: FUSECHAT_CACHE or ~/.cache/fusechat)")


def _align(options: dict[str, Any]) -> None:
    from fusechat_fuse import align
    from fusechat_fuse.alignment.certificate import summary_lines

    _say("\n".join(summary_lines(align(**options)["certificate"])))


def _combine_flags(parser: FlagParser) -> None:
    add_flag(parser, "aligned", required=True, nargs="+", help="two or more directories that align or combine wrote")
    add_flag(parser, "output_dir", required=True, help="new, or an interrupted run's, which is continued")
    add_flag(
        parser,
        "function",
        help="min_ce_slice (the best source of each slice), min_ce or avg_ce (preset: min_ce_slice, paper min_ce)",
    )
    add_flag(
        parser, "ce_unit", help="byte, which is comparable between tokenizers, or token (preset: byte, paper token)"
    )
    _preset_flag(parser)
    add_flag(parser, "slice_column", "slice", help="slices of min_ce_slice: slice (the data's own) or auto (clusters)")
    add_flag(parser, "slice_pattern", help="a regular expression on the ids that names the slices instead")


def _combine(options: dict[str, Any]) -> None:
    from fusechat_fuse import combine
    from fusechat_fuse.alignment.combination import combination_lines

    _say("\n".join(combination_lines(combine(options.pop("aligned"), **options))))


def _train_flags(parser: FlagParser) -> None:
    from transformers import HfArgumentParser

    from fusechat_fuse.training.config import FusionConfig
    from fusechat_fuse.training.options import SECTIONS, TrainArguments

    classes = [TrainArguments, FusionConfig]
    given = HfArgumentParser(classes, add_help=False, conflict_handler="resolve")  # pyright: ignore[reportArgumentType]
    parser.adopt(given, SECTIONS, "all other arguments of transformers.TrainingArguments")
    parser.flag("output_dir").required = True
    parser.flag("debug").nargs = "*"  # --debug alone shows tracebacks, with a value it is transformers' own


def _train(options: dict[str, Any]) -> None:
    from dataclasses import fields

    from fusechat_fuse.training.config import FusionConfig
    from fusechat_fuse.training.run import train

    of_config = {field.name for field in fields(FusionConfig) if field.init}
    config = FusionConfig(**{name: options.pop(name) for name in list(options) if name in of_config})
    _say(train(config=config, **options))
    end_process_group()


def _inspect_flags(parser: FlagParser) -> None:
    parser.add_argument("path", metavar="PATH", help="directory that represent, align or combine wrote")
    add_flag(parser, "row", "0", help="which conversation: its number or its id")
    add_flag(parser, "html", metavar="FILE", help="write one self-contained page of this conversation (aligned data)")
    add_flag(parser, "tokens", 40, help="predicted tokens shown of the conversation")
    add_flag(parser, "source_representation", help="where the source's representation is now, if it was moved")


def _inspect(options: dict[str, Any]) -> None:
    from fusechat_fuse.inspection.run import inspect_path

    _say(inspect_path(options.pop("path"), **options))


def _answer_flags(parser: FlagParser) -> None:
    add_flag(parser, "benchmark", required=True, help="mt_bench, alpaca_eval or chat: whose files are read and written")
    add_flag(parser, "model", required=True, help="the model that answers: a directory or a Hub name")
    add_flag(parser, "questions", required=True, help="the benchmark's file; for chat any chat data")
    add_flag(parser, "output", required=True, help="the answers' file; for mt_bench model_answer/MODEL_ID.jsonl")
    add_flag(parser, "temperature", type=float, help="of all (default: mt_bench's by category, else 0, greedy)")
    add_flag(parser, "max_new_tokens", type=int, help="of an answer (default: 1024, alpaca_eval 2048)")
    add_flag(parser, "batch_size", 16, help="questions generated at once")
    add_flag(parser, "seed", 0, help="of what is drawn at temperatures above 0")
    add_flag(parser, "dtype", "auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    add_flag(parser, "device_map", help="auto: one model over several GPUs")
    add_flag(parser, "trust_remote_code", False, help="run code that comes with the model")


def _answer(options: dict[str, Any]) -> None:
    from fusechat_fuse import answer

    _say(answer(options.pop("model"), options.pop("questions"), options.pop("output"), **options))


def _run_flags(parser: FlagParser) -> None:
    from fusechat_fuse.pipeline.steps import STAGES

    parser.add_argument("recipe", metavar="RECIPE.yml", help="models, data and options of the whole fusion")
    add_flag(parser, "only", help=f"one stage: {', '.join(STAGES)}")
    add_flag(parser, "from", dest="start", help="the first stage; what comes before must be there")
    add_flag(parser, "dry_run", False, help="say what would be done, and do nothing")


def _run_recipe(options: dict[str, Any]) -> None:
    from fusechat_fuse.pipeline.run import run

    run(options.pop("recipe"), check=_options_of, **options)


def _plan_flags(parser: FlagParser) -> None:
    from fusechat_fuse.pipeline.costs import GPUS

    parser.add_argument("recipe", metavar="RECIPE.yml", help="as `run` takes it")
    add_flag(parser, "gpu", help=f"memory and times on {', '.join(GPUS)} (default: memory without a GPU)")
    add_flag(parser, "sample", 10_000, help="conversations encoded of each data set; exact where it has no more")
    add_flag(parser, "json", False, help="all figures as JSON")


def _plan(options: dict[str, Any]) -> None:
    from fusechat_fuse.pipeline.plan import format_plan, plan

    as_json = options.pop("json")
    found = plan(options.pop("recipe"), options_of=_options_of, **options)
    _say(found if as_json else format_plan(found))


def _options_of(argv: list[str]) -> dict[str, Any]:
    """All options of a subcommand by its arguments; raises InputError for those that it would refuse."""
    return parser_of(argv[0]).parse(argv[1:])


def parser_of(name: str) -> FlagParser:
    """The flags of a subcommand."""
    command = COMMANDS[name]
    return FlagParser(name, command.what, command.add_flags, command.example)


class Command(NamedTuple):
    """A subcommand: what it does in a sentence, its flags, what runs it, and one whole command line."""

    what: str
    add_flags: Callable[[FlagParser], None]
    run: Callable[[dict[str, Any]], None]
    example: str


COMMANDS = {
    "run": Command(
        "Carry out a recipe: every stage below, the merge and a report.",
        _run_flags,
        _run_recipe,
        "fusechat-fuse run examples/recipes/fusechat-7b-v2.yml",
    ),
    "plan": Command(
        "Say what a recipe costs, and what of it will fail, before anything runs.",
        _plan_flags,
        _plan,
        "fusechat-fuse plan examples/recipes/fusechat-7b-v2.yml --gpu h100",
    ),
    "represent": Command(
        "Run a model once over chat data and keep its top-k distributions.",
        _represent_flags,
        _represent,
        "fusechat-fuse represent --model_name_or_path SOURCE --pivot_name_or_path PIVOT --data_path chats.jsonl "
        "--output_dir representations/source",
    ),
    "import": Command(
        "Take distributions that others released, a model's own or aligned ones.",
        _import_flags,
        _import,
        "fusechat-fuse import RELEASED --model_name_or_path TOKENIZER --output_dir representations/source",
    ),
    "compare": Command(
        "Show which model knows which slice of the data better.",
        _compare_flags,
        _compare,
        "fusechat-fuse compare representations/pivot representations/source --output_dir comparison",
    ),
    "align": Command(
        "Carry a source's distributions to the pivot's tokens and vocabulary.",
        _align_flags,
        _align,
        "fusechat-fuse align --pivot_representation representations/pivot --source_representation "
        "representations/source --output_dir aligned/source",
    ),
    "combine": Command(
        "Combine several aligned sources.",
        _combine_flags,
        _combine,
        "fusechat-fuse combine --aligned aligned/a aligned/b --output_dir combined",
    ),
    "inspect": Command(
        "Show what is in a representation or an alignment.",
        _inspect_flags,
        _inspect,
        "fusechat-fuse inspect aligned/source --row 3 --html page.html",
    ),
    "train": Command(
        "Fine-tune the pivot on aligned data: one target.",
        _train_flags,
        _train,
        "fusechat-fuse train --model_name_or_path PIVOT --data_path aligned/source --output_dir target",
    ),
    "answer": Command(
        "Answer a benchmark's questions in its judge's format.",
        _answer_flags,
        _answer,
        "fusechat-fuse answer --benchmark mt_bench --model MERGED --questions question.jsonl --output "
        "model_answer/MERGED.jsonl",
    ),
}


def _say(result) -> None:
    """A command's result, on standard output, by the main process."""
    if speaks():
        print(result if isinstance(result, str) else json.dumps(result, indent=1, default=str), flush=True)


def _help() -> str:
    lines = [f"  {name:10} {command.what}" for name, command in COMMANDS.items()]
    usage = "usage: fusechat-fuse SUBCOMMAND [flags]"
    return "\n".join([usage, "", *lines, "", "fusechat-fuse SUBCOMMAND --help", "fusechat-fuse --version"])


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from fusechat_fuse.models.identity import library_versions

        print(", ".join(f"{name} {number}" for name, number in library_versions().items()))
        return 0
    try:
        return _run(argv)
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        text, code = as_sentence(error)
        if not speaks():
            time.sleep(FIRST_SPEAKS)
        print(f"fusechat-fuse: {text}", file=sys.stderr)
        return code


def _run(argv: list[str]) -> int:
    name = argv[0]
    if name not in COMMANDS:
        raise InputError(unknown("subcommand", name, list(COMMANDS)))
    try:
        options = parser_of(name).parse(argv[1:])
    except SystemExit as end:  # --help
        return int(end.code or 0)
    if name != "train":
        del options["debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("fusechat_fuse").setLevel(logging.INFO if speaks() else logging.WARNING)
    COMMANDS[name].run(options)
    return 0
