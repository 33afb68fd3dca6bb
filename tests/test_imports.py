"""What may import what: the packages are strangers, the façades are light, and in fusechat_fuse a room
uses what is shared, never another room."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fusechat_fuse
import fusechat_merge

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "mergekit", "scipy", "rapidfuzz", "accelerate", "numba"}
LIGHT = {  # may load torch, and nothing else that is heavy
    "fusechat_fuse": [
        *("alignment.run", "alignment.combination", "store.shards", "training.loss", "training.choice"),
        *("alignment.correspondence", "alignment.prefix", "alignment.mappings", "alignment.vocabulary_maps"),
    ],
    "fusechat_merge": ["chunks", "kernel", "passes", "selection"],
}
PURE = {  # pure maths: at the top of the file numpy, torch, the standard library, and one another
    "alignment": [
        "correspondence",
        "candidates",
        "paths",
        "prefix",
        "single_id",
        "sparse_rows",
        "vocabulary_maps",
        "candidate_outcomes",
        "mappings",
    ],
    "training": ["choice", "loss"],
    "store": ["cross_entropy"],
}
ROOMS = ("capture", "alignment", "inspection", "training", "evaluation", "pipeline")  # strangers to each other
ALSO_USED = {"inspection": {"alignment"}}  # it shows what alignment made
SHARED = (
    "store",
    "text",
    "models",
    "processes",
    "errors",
    "presets",
    "progress",
    "flags",
    "requirements",
    "user_code",
)  # which any room may use; they use none
COMMAND = ("cli", "commands")  # the top, which nothing below it uses


def loaded_after(code: str) -> set[str]:
    """Top-level packages of a fresh interpreter after `code` (without the start-up hooks of site-packages)."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}; import json; print(json.dumps(sorted(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(finished.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "package", ["fusechat_fuse", "fusechat_merge", "fusechat_fuse.cli", "fusechat_fuse.models.logit_transform"]
)
def test_imports_nothing_heavy(package):
    assert not loaded_after(f"import {package}") & HEAVY


@pytest.mark.slow
def test_the_method_loads_nothing_heavy_but_torch():
    modules = ", ".join(f"{package}.{module}" for package, modules in LIGHT.items() for module in modules)
    assert not loaded_after(f"import {modules}") & (HEAVY - {"torch"})


def imported_by(path: Path, nodes=ast.walk) -> set[str]:
    """Modules that a file imports, anywhere in it (`nodes=ast.walk`) or at its top (`ast.iter_child_nodes`)."""
    names = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the room"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_used_by(part: str) -> dict[str, set[str]]:
    """file -> the parts of fusechat_fuse that it imports."""
    folder = ROOT / "fusechat_fuse"
    files = [folder / f"{part}.py"] if (folder / f"{part}.py").exists() else sorted((folder / part).glob("**/*.py"))
    assert files, part
    return {
        str(path.relative_to(ROOT)): {
            name.split(".")[1] for name in imported_by(path) if name.startswith("fusechat_fuse.")
        }
        for path in files
    }


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_strangers(room):
    for file, used in rooms_used_by(room).items():
        assert not used & (set(ROOMS) - {room} - ALSO_USED.get(room, set())), file
        assert not used & set(COMMAND), file


@pytest.mark.parametrize("part", SHARED)
def test_what_is_shared_uses_no_room(part):
    for file, used in rooms_used_by(part).items():
        assert not used & {*ROOMS, *COMMAND}, file


def test_every_part_is_a_room_or_shared():
    folder = ROOT / "fusechat_fuse"
    parts = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts == {*ROOMS, *SHARED, *COMMAND, "__init__", "__main__"}


@pytest.mark.parametrize(("room", "module"), [(room, m) for room, modules in PURE.items() for m in modules])
def test_pure_maths_imports_numpy_torch_and_its_kind(room, module):
    path = ROOT / "fusechat_fuse" / room / f"{module}.py"
    for name in imported_by(path, ast.iter_child_nodes):
        top = name.split(".")[0]
        if top == "fusechat_fuse":
            of = name.split(".")[1:3]
            assert of[0] in ("errors", "presets") or (len(of) == 2 and of[1] in PURE.get(of[0], [])), name
        else:
            assert top in {"numpy", "torch"} | sys.stdlib_module_names, name


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
        modules = {path.stem for path in Path(package.__file__).parent.rglob("*") if path.name != "__pycache__"}
        assert not modules & set(package.__all__)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(AttributeError, match="it offers load_conversations, represent"):
        fusechat_fuse.alignn  # noqa: B018


def modules_of(package: str) -> dict[str, Path]:
    """Name of each module -> its file."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / package).rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@pytest.mark.parametrize("package", ["fusechat_fuse", "fusechat_merge"])
def test_modules_import_each_other_in_no_circle(package):
    """Imports inside functions and for types alone count too."""
    modules = modules_of(package)
    graph = {
        name: {module for found in imported_by(path) for module in (found, found.rpartition(".")[0])}
        & {*modules} - {name}
        for name, path in modules.items()
        if name != package  # the facade, which every import of a part runs first
    }
    graph = {name: used - {package} for name, used in graph.items()}
    assert any(graph.values())
    assert {*graphlib.TopologicalSorter(graph).static_order()} == {*graph}  # CycleError names a circle


def lines_without_docstring(node) -> int:
    first = node.body[0] if ast.get_docstring(node) is not None else None
    return node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if first else 0)


@pytest.mark.parametrize("package", ["fusechat_fuse", "fusechat_merge"])
def test_functions_have_60_lines_at_most_and_modules_350(package):
    long = []
    for name, path in modules_of(package).items():
        text = path.read_text()
        if len(text.splitlines()) > 350:
            long.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and lines_without_docstring(node) > 60:
                long.append(f"{name}.{node.name}: {lines_without_docstring(node)} lines")
    assert not long
