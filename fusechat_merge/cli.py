"""The command `fusechat-merge`: is the plug-in in place, what would a merge do, a merge that leaves nothing half done.

Exit codes: 0 done, 1 the run failed, 2 bad arguments or bad input (one sentence on standard error; `--debug` shows the
traceback).
"""

import argparse
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        if arguments.debug:
            raise
        print(f"fusechat-merge: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusechat-merge", description="SCE and VaRM merges with mergekit.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="say which implementation mergekit runs for `sce` and `varm`")
    doctor.set_defaults(run=_doctor)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    """Prints what serves the methods; 1 where the start-up hook is not active or mergekit's own `sce` is served."""
    from fusechat_merge import _autoload

    active = _autoload.installed()
    switch = os.environ.get(_autoload.SWITCH)
    ours, theirs = _autoload.versions()
    print(f"fusechat {ours}, mergekit {theirs}, Python {sys.version.split()[0]} at {sys.prefix}")
    if active:
        print("start-up hook: active")
    elif switch == "0":
        print(f"start-up hook: off, because {_autoload.SWITCH}=0 (unset it, or use `fusechat-merge yaml`)")
    else:
        print("start-up hook: missing (install with pip into site-packages; `--target` installs skip .pth files)")
    if switch not in (None, "0", "1"):
        print(f"{_autoload.SWITCH}={switch!r} is neither 0 (off) nor 1 (on) and counts as on")

    from mergekit.merge_methods import registry

    served = True
    for name, place in _autoload.OWN.items():
        try:
            method = registry.get(name)
        except RuntimeError:
            implementation = "nothing"
        else:
            implementation = getattr(method, "implementation", method)
            implementation = getattr(implementation, "__module__", type(method).__module__)
        served &= implementation == place.partition(":")[0]
        print(f"merge_method {name}: served by {implementation}")
    return 0 if active and served else 1
