"""The installed versions of fusechat and mergekit, for reports and warnings. Standard library only."""


def versions() -> tuple[str, str]:
    """(fusechat's version, mergekit's version), "unknown" where a distribution is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for distribution in ("fusechat", "mergekit"):
        try:
            found.append(version(distribution))
        except PackageNotFoundError:
            found.append("unknown")
    return found[0], found[1]
