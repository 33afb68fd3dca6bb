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


wheel_alone = pytest.mark.parametrize("environment", ["wheel"], indirect=True)


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


def test_start_up_files_are_installed_and_recorded(environment):
    kind, _, site = environment
    recorded = next(site.glob("fusechat-*.dist-info/RECORD")).read_text()
    for name in ("fusechat_merge.pth", "fusechat_merge.start"):
        assert (site / name).read_text() == (ROOT / name).read_text()
        assert f"{name}," in recorded  # pip uninstall takes them away
    assert ("fusechat_merge/py.typed," in recorded) == (kind == "wheel")  # an editable install has it in the sources


def test_doctor(environment):
    _, python, _ = environment
    result = run([python.parent / "fusechat-merge", "doctor"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "start-up hook: active" in result.stdout
    assert "merge_method sce: served by fusechat_merge.method" in result.stdout


@wheel_alone
def test_doctor_where_the_hook_is_off(environment):
    _, python, _ = environment
    off = run([python.parent / "fusechat-merge", "doctor"], FUSECHAT_MERGE_AUTOLOAD="0")
    assert off.returncode == 1
    assert "off, because FUSECHAT_MERGE_AUTOLOAD=0" in off.stdout
    assert "merge_method sce: served by mergekit.merge_methods.sce" in off.stdout


@wheel_alone
def test_mergekit_runs_our_sce(environment, tmp_path):
    _, python, _ = environment
    paths = write_family(tmp_path)
    (tmp_path / "sce.yml").write_text(yaml.safe_dump(recipe(*paths)))
    result = run([python, "-m", "mergekit.scripts.run_yaml", tmp_path / "sce.yml", tmp_path / "merged", "-v"])
    assert result.returncode == 0, result.stderr
    assert "merge_method sce is served by fusechat" in result.stderr
    merged, pivot, targets = read(tmp_path / "merged"), read(paths[0]), [read(target) for target in paths[1]]
    for name, base in pivot.items():
        exact, eta = reference_merge.sce(base, [target[name] for target in targets])
        assert eta == pytest.approx([0.01, 0.1, 0.89], abs=0.2)
        assert torch.allclose(merged[name].double(), exact, rtol=0, atol=2e-8), name
        third = torch.stack([target[name] - base for target in targets]).double()  # mergekit's own coefficients
        assert not torch.allclose(base + third.mean(0), exact, rtol=0, atol=1e-6)


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
