"""Versions of torch and transformers that only this package needs: checked when it is used, as `pip install` beside a
working mergekit leaves both as they are."""

from importlib.metadata import PackageNotFoundError, version

from fusechat_fuse.errors import InputError

NEEDED = {"fusechat_fuse": {"torch": "2.7"}, "training": {"torch": "2.7", "transformers": "5.10"}}


def check_versions(part: str) -> None:
    """Raise InputError where torch or transformers is older than a part of NEEDED needs; versions only, no import."""
    for package, least in NEEDED[part].items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or _number(found) < _number(least):
            raise InputError(
                f"{package} for {part}: expected {least} or later, got {found}. Run pip install -U "
                f"'{package}>={least}'."
            )


def _number(text: str) -> tuple[int, ...]:
    """(major, minor) of a version."""
    return tuple(int(part) for part in text.split(".")[:2])
