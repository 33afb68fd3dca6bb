"""What may import what: the packages are strangers, the façades are light, imports point down."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fusechat_fuse
import fusechat_merge

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "mergekit", "scipy", "rapidfuzz", "accelerate", "numba"}
PURE = {
    "fusechat_fuse": ["alignment", "correspondence", "fusion", "loss", "mapping", "representation", "vocabulary"],
    "fusechat_merge": ["chunks", "kernel", "portable", "selection"],
}


def loaded_after(code: str) -> set[str]:
    """Top-level packages of a fresh interpreter after `code` (without the start-up hooks of site-packages)."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}; import json; print(json.dumps(sorted(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(finished.stdout.splitlines()[-1])}


@pytest.mark.parametrize("package", ["fusechat_fuse", "fusechat_merge", "fusechat_fuse.cli"])
def test_imports_nothing_heavy(package):
    assert not loaded_after(f"import {package}") & HEAVY


@pytest.mark.parametrize(("package", "module"), [(p, m) for p, modules in PURE.items() for m in modules])
def test_the_method_needs_numpy_and_torch_only(package, module):
    assert not loaded_after(f"import {package}.{module}") & (HEAVY - {"torch"})


def imported_by(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(
    ("package", "stranger"), [("fusechat_fuse", "fusechat_merge"), ("fusechat_merge", "fusechat_fuse")]
)
def test_the_packages_never_import_each_other(package, stranger):
    files = list((ROOT / package).glob("**/*.py"))
    assert files
    for path in files:
        assert not [name for name in imported_by(path) if name.split(".")[0] == stranger], path


def test_facade_names_resolve_and_hide_no_module():
    for package in (fusechat_fuse, fusechat_merge):
        for name in package.__all__:
            assert getattr(package, name) is not None
        modules = {path.stem for path in Path(package.__file__).parent.glob("*.py")}
        assert not modules & set(package.__all__)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(AttributeError, match="it offers load_conversations, represent"):
        fusechat_fuse.alignn  # noqa: B018
