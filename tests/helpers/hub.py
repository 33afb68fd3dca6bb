"""A Hub cache on disk, made by hand: names resolve in it without a network."""

import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_model(hub: Path, name: str, folder: Path, *, commit: str = COMMIT, leave_out: tuple[str, ...] = ()) -> Path:
    """Lay a model directory into a cache as `name` at a commit, which becomes `main`; returns the snapshot."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.name not in leave_out:
            shutil.copyfile(file, snapshot / file.name)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return snapshot
