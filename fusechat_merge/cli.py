"""The command `fusechat-merge`: check the installation, inspect a recipe, merge, complete the model card.

Exit codes: 0 done, 1 the run failed, 2 bad arguments or bad input (one sentence on standard error; `--debug` shows the
traceback), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import fusechat_merge
from fusechat_merge import _autoload
from fusechat_merge.errors import FullDisk
from fusechat_merge.versions import versions


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, flags = parser.parse_known_args(words)
    if flags and arguments.command != "yaml":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    arguments.raw = words[words.index(arguments.command) + 1 :]
    try:
        if arguments.command != "doctor":  # which reports what is served without that
            fusechat_merge.register()
        return arguments.run(arguments) or 0
    except (Exception, KeyboardInterrupt) as error:
        if arguments.debug:
            raise
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):  # click wraps it
            print("fusechat-merge: interrupted", file=sys.stderr)
            return 130
        print(f"fusechat-merge: {_sentence(error)}", file=sys.stderr)
        bad_input = isinstance(error, ValueError | OSError) or type(error).__module__.startswith("click")
        return 2 if bad_input and not isinstance(error, FullDisk) else 1


def _sentence(error: Exception) -> str:
    errors, format_message = (getattr(error, name, None) for name in ("errors", "format_message"))
    if errors is not None:  # pydantic
        return errors()[0]["msg"]
    if format_message is not None:  # click
        return format_message()
    text = " ".join(str(error).split())  # some hold a whole configuration
    text = text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
    clear = isinstance(error, ValueError | OSError | RuntimeError) and text
    return text if clear else f"{type(error).__name__}: {text}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusechat-merge", description="Merge models by SCE or VaRM with mergekit.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="show which implementation mergekit uses for `sce` and `varm`")
    doctor.set_defaults(run=_doctor)

    inspect = commands.add_parser("inspect", help="compute the coefficients of a recipe without writing a model")
    inspect.add_argument("config", metavar="CONFIG", help="mergekit configuration with merge_method sce or varm")
    inspect.add_argument(
        "--output", required=True, metavar="DIR", help="new directory for the table, the summary and the pictures"
    )
    inspect.add_argument("--device", help="device to compute on (default: cpu)")
    inspect.add_argument(
        "--lora_merge_cache", metavar="DIR", help="directory to merge LoRA adapters in (model+adapter)"
    )
    inspect.add_argument("--trust_remote_code", action="store_true", help="allow custom code from a model's repository")
    inspect.add_argument("--quiet", action="store_true", help="show no progress bar")
    inspect.set_defaults(run=_inspect)

    card = commands.add_parser(
        "card", help="add the recipe, the coefficients and Hub metadata to a merged model's README"
    )
    card.add_argument("merged", metavar="MERGED_DIR", help="output of mergekit-yaml")
    card.add_argument(
        "--report", metavar="DIR", help="merge report (default: MERGED_DIR/merge-report, computed if missing)"
    )
    card.set_defaults(run=_card)

    merge = commands.add_parser(
        "yaml",
        help="run mergekit-yaml with these methods; the output appears complete or not at all",
        usage="%(prog)s [-h] CONFIG OUT [FLAG ...]",
        epilog="All flags are mergekit-yaml's own (see mergekit-yaml --help).",
    )
    merge.add_argument("config", metavar="CONFIG", help="mergekit configuration")
    merge.add_argument("out", metavar="OUT", help="new directory for the merged model")
    merge.set_defaults(run=_yaml)
    return parser


def _yaml(arguments: argparse.Namespace) -> None:
    from fusechat_merge import staging

    config, out, *flags = arguments.raw
    if (config, out) != (arguments.config, arguments.out):  # else a flag's value would be taken for OUT
        raise ValueError(
            f"arguments of fusechat-merge yaml: expected CONFIG OUT before the flags, got {' '.join(arguments.raw)}. "
            "Put the flags last."
        )
    staging.merge(config, out, flags)


def _inspect(arguments: argparse.Namespace) -> None:
    from mergekit.options import MergeOptions

    from fusechat_merge import inspection

    options = MergeOptions(
        device=arguments.device,
        lora_merge_cache=arguments.lora_merge_cache,
        trust_remote_code=arguments.trust_remote_code,
        quiet=arguments.quiet,
    )
    print(inspection.table(inspection.inspect(arguments.config, arguments.output, options=options).summary()))


def _card(arguments: argparse.Namespace) -> None:
    from fusechat_merge import card

    print(card.write(arguments.merged, arguments.report))


def _doctor(arguments: argparse.Namespace) -> int:
    """Print which implementation serves each method; 1 where the hook is not active or one is not ours."""
    active = _autoload.installed()
    switch = os.environ.get(_autoload.SWITCH)
    ours, theirs = versions()
    print(f"fusechat {ours}, mergekit {theirs}, Python {sys.version.split()[0]} at {sys.prefix}")
    if active:
        print("start-up hook: active")
    elif switch == "0":
        print(f"start-up hook: off, because {_autoload.SWITCH}=0 (unset it, or use `fusechat-merge yaml`)")
    else:
        print("start-up hook: missing (install with pip into site-packages; `--target` installs skip .pth files)")
    if switch not in (None, "0", "1"):
        print(f"{_autoload.SWITCH}={switch!r} is neither 0 (off) nor 1 (on) and counts as on")
    expected = {name: place.partition(":")[0] for name, place in _autoload.OWN.items()}
    served = expected if _served_for_certain() else {name: _implementation(name) for name in expected}
    for name, implementation in served.items():
        print(f"merge_method {name}: served by {implementation}")
    return 0 if active and served == expected else 1


def _served_for_certain() -> bool:
    """Whether the hook is known to serve our methods without importing mergekit, which takes ten seconds.

    It is where the hook is active, the installed packages declare our methods and no others of these names, and
    mergekit is a published release that the hook was tested with (not a fork, not a working copy).
    """
    import importlib.metadata

    mergekit = importlib.metadata.distribution("mergekit")
    published = mergekit.version in _autoload.TESTED and mergekit.read_text("direct_url.json") is None
    return _autoload.installed() and published and _autoload.declared().items() >= _autoload.OWN.items()


def _implementation(name: str) -> str:
    """The module of what mergekit's registry serves under this name."""
    from mergekit.merge_methods import registry

    try:
        method = registry.get(name)
    except RuntimeError:
        return "nothing"
    implementation = getattr(method, "implementation", method)
    return getattr(implementation, "__module__", type(method).__module__)
