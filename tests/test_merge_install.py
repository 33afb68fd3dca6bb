"""After nothing but `pip install`, an unchanged mergekit runs our `sce`: in fresh environments, wheel and editable."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers import reference_merge
from tests.helpers.merge_checkpoints import read, recipe, write_family

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.install
SOURCES = (
    "setup.py",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "fusechat_merge.pth",
    "fusechat_merge.start",
)


def run(command, **environment):
    """A finished process; the tests' own PYTHONPATH must not help it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FUSECHAT_MERGE_AUTOLOAD")}
    return subprocess.run(
        [str(part) for part in command],
        env={**kept, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the distribution's sources, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    for package in ("fusechat_merge", "fusechat_fuse"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(request, sources, tmp_path_factory):
    """A fresh virtual environment with the distribution; third-party packages come from the running one."""
    home = tmp_path_factory.mktemp(request.param)
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q"]
    install += ["--no-build-isolation", *(["-e"] if request.param == "editable" else []), sources]
    result = run(install)
    assert result.returncode == 0, result.stderr
    return request.param, python, site


@pytest.fixture(scope="module")
def merge_inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    pivot, targets = write_family(directory)
    config = directory / "sce.yml"
    config.write_text(yaml.safe_dump(recipe(pivot, targets)))
    return config, read(pivot), [read(target) for target in targets]


def merge(python, config, out, **environment):
    result = run([python, "-m", "mergekit.scripts.run_yaml", config, out, "-v"], **environment)
    assert result.returncode == 0, result.stderr
    return read(out), result.stderr


def test_start_up_files_are_installed_and_recorded(environment):
    kind, _, site = environment
    recorded = next(site.glob("fusechat-*.dist-info/RECORD")).read_text()
    for name in ("fusechat_merge.pth", "fusechat_merge.start"):
        assert (site / name).read_text() == (ROOT / name).read_text()
        assert f"{name}," in recorded  # pip uninstall takes them away
    assert ("fusechat_merge/py.typed," in recorded) == (kind == "wheel")  # an editable install has it in the sources


def test_mergekit_runs_our_sce(environment, merge_inputs, tmp_path):
    config, pivot, targets = merge_inputs
    kind, python, _ = environment
    merged, log = merge(python, config, tmp_path / "ours")
    assert "merge_method sce is served by fusechat" in log
    differs = 0
    for name, base in pivot.items():
        exact, eta = reference_merge.sce(base, [target[name] for target in targets])
        assert eta == pytest.approx([0.01, 0.1, 0.89], abs=0.2)
        assert torch.allclose(merged[name].double(), exact, rtol=0, atol=2e-8), name
        third = torch.stack([target[name] - base for target in targets]).double()
        differs += int(not torch.allclose(base + third.mean(0), exact, rtol=0, atol=1e-6))
    assert differs == len(pivot)
    if kind == "wheel":  # the switch belongs to the hook, not to the way of installing
        built_in, log = merge(python, config, tmp_path / "built-in", FUSECHAT_MERGE_AUTOLOAD="0")
        assert "served by fusechat" not in log
        name = "model.layers.0.mlp.up_proj.weight"
        exact, _ = reference_merge.sce(pivot[name], [target[name] for target in targets])
        error = (built_in[name].double() - exact).norm() / (exact - pivot[name].double()).norm()
        assert error > 0.1  # mergekit's own takes 1/3 for each coefficient


def test_doctor(environment):
    _, python, _ = environment
    command = [python.parent / "fusechat-merge", "doctor"]
    result = run(command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "start-up hook: active" in result.stdout
    assert "merge_method sce: served by fusechat_merge.method" in result.stdout
    off = run(command, FUSECHAT_MERGE_AUTOLOAD="0")
    assert off.returncode == 1
    assert "off, because FUSECHAT_MERGE_AUTOLOAD=0" in off.stdout
    assert "merge_method sce: served by mergekit.merge_methods.sce" in off.stdout


def test_a_process_without_mergekit_pays_for_two_small_modules(environment):
    kind, python, _ = environment
    modules = set()
    for switch in ("1", "0"):
        result = run([python, "-X", "importtime", "-c", "pass"], FUSECHAT_MERGE_AUTOLOAD=switch)
        assert result.returncode == 0
        modules |= {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert {"fusechat_merge", "fusechat_merge._autoload"} <= modules
    heavy = {"torch", "numpy", "mergekit", "importlib.metadata", "importlib.abc", "re", "typing", "warnings", "logging"}
    if kind == "wheel":  # an editable install's own finder may import more
        assert not modules & heavy
    assert {name for name in modules if name.startswith("fusechat")} == {"fusechat_merge", "fusechat_merge._autoload"}
