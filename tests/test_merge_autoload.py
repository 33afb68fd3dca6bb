"""The start-up hook, on a stand-in for mergekit that imports at once, and the orders of import on the real one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
KNOWN = """
_METHODS = {"sce": "mergekit's own", "ties": "mergekit's own"}
def get(name):
    return _METHODS[name]
"""


@pytest.fixture
def site(tmp_path):
    """A directory with a small `mergekit` 9.9 and a distribution that declares merge methods."""
    package = tmp_path / "mergekit" / "merge_methods"
    package.mkdir(parents=True)
    (tmp_path / "mergekit" / "__init__.py").touch()
    (package / "__init__.py").write_text("from mergekit.merge_methods.registry import get\nready = True\n")
    (package / "registry.py").write_text(KNOWN)
    distribution(tmp_path, "mergekit", "9.9")
    distribution(
        tmp_path, "plugin", "1.0", "[mergekit.merge_methods]\nsce = plugin_methods:sce\nnew = plugin_methods:new\n"
    )
    (tmp_path / "plugin_methods.py").write_text("sce, new = 'the plug-in', 'a new one'\n")
    return tmp_path


def distribution(site, name, version, entry_points=""):
    home = site / f"{name}-{version}.dist-info"
    home.mkdir()
    (home / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (home / "entry_points.txt").write_text(entry_points)


def python(site, code, **environment):
    """Output of a process that has run the .pth line first. With a stand-in for mergekit, what is installed here is out
    of sight: no site-packages, and our package without the metadata that may lie beside it."""
    start_up = (ROOT / "fusechat_merge.pth").read_text().strip()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FUSECHAT")}
    stand_in, ours = (site / "mergekit").is_dir(), ROOT
    if stand_in:
        ours = site / "ours"
        ours.mkdir(exist_ok=True)
        if not (ours / "fusechat_merge").exists():
            (ours / "fusechat_merge").symlink_to(ROOT / "fusechat_merge")
    result = subprocess.run(
        [sys.executable, *(["-S"] if stand_in else []), "-c", f"{start_up}\n{code}"],
        env={**kept, "PYTHONPATH": f"{site}{os.pathsep}{ours}", "HF_HUB_OFFLINE": "1", **environment},
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stderr.splitlines(True) if not line.startswith("Failed to load CPU gemm_4bit")]
    return result.stdout.strip(), "".join(told)  # but for what bitsandbytes says when it is imported


POINTS = "[mergekit.merge_methods]\nsce = fusechat_merge.method:sce\nvarm = fusechat_merge.method:varm\n"
SHOW = (
    "import mergekit.merge_methods as m; print(m.get('sce'), '|', m.registry._METHODS.get('new'), '|', m.get('ties'))"
)


def test_declared_methods_take_the_place_of_built_ins(site):
    assert python(site, SHOW) == ("the plug-in | a new one | mergekit's own", "")


def test_the_switch_turns_it_off(site):
    assert python(site, SHOW, FUSECHAT_MERGE_AUTOLOAD="0") == ("mergekit's own | None | mergekit's own", "")
    assert python(site, SHOW, FUSECHAT_MERGE_AUTOLOAD="1")[0].startswith("the plug-in")


def test_installing_again_changes_nothing(site):
    code = "import sys, fusechat_merge._autoload as a; a.install(); a.install(); n = len(sys.meta_path)\n"
    code += "a.install(); assert n == len(sys.meta_path)\n" + SHOW
    assert python(site, code)[0].startswith("the plug-in")


@pytest.mark.parametrize(
    "registry", ["METHODS = {}\nget = METHODS.get\n", "_METHODS = ()\ndef get(name): return name\n"]
)
def test_an_unknown_registry_is_one_warning_with_both_versions_and_mergekit_goes_on(site, registry):
    distribution(site, "fusechat", "4.5")
    (site / "mergekit" / "merge_methods" / "registry.py").write_text(registry)
    out, err = python(site, "import mergekit.merge_methods as m; print(m.ready)")
    assert out == "True"
    assert err.count("RuntimeWarning") == 1
    assert "fusechat 4.5 with mergekit 9.9: its merge-method registry is not the one this version knows" in err


def test_a_method_that_cannot_be_loaded_is_one_warning(site):
    (site / "plugin_methods.py").write_text("sce = 'the plug-in'\nraise ImportError('no such library')\n")
    out, err = python(site, SHOW)
    assert out == "mergekit's own | None | mergekit's own"
    assert "merge method 'sce' of plugin_methods cannot be loaded and is left out" in err
    assert "no such library" in err


def test_a_missing_package_is_silent(site):
    out, err = python(site, "print('fine')", PYTHONPATH=str(site))
    assert (out, err) == ("fine", "")


OURS = "import fusechat_merge, fusechat_merge._autoload as a; a.OWN = {n: f'fusechat_methods:{n}' for n in a.OWN}\n"


def test_register_by_hand_serves_the_methods_with_the_hook_off(site):
    (site / "fusechat_methods.py").write_text("sce, varm = 'ours', 'ours too'\n")
    code = OURS + "fusechat_merge.register(); fusechat_merge.register()\n"
    code += "import mergekit.merge_methods as m; print(m.get('sce'), m.get('varm'))"
    assert python(site, code, FUSECHAT_MERGE_AUTOLOAD="0") == ("ours ours too", "")


@pytest.mark.parametrize("first", ["plan", "register", "merge"])
def test_registering_by_hand_follows_modules_imported_before_and_after(site, first):
    (site / "fusechat_methods.py").write_text("sce, varm = 'ours', 'ours too'\n")
    for name in ("plan", "merge"):
        (site / "mergekit" / f"{name}.py").touch()
    code = OURS + "a.patch = lambda module: setattr(module, 'followed', True)\n"
    code += f"import mergekit.{first}\n" if first != "register" else ""
    code += "fusechat_merge.register(); import mergekit.plan, mergekit.merge\n"
    code += "print(mergekit.plan.followed, mergekit.merge.followed)"
    assert python(site, code, FUSECHAT_MERGE_AUTOLOAD="0") == ("True True", "")


ORDERS = {
    "our module first": "from fusechat_methods import sce, varm; import mergekit.merge_methods as m",
    "mergekit first": "import mergekit.merge_methods as m; from fusechat_methods import sce, varm",
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_method_module_that_imports_mergekit_is_served_in_any_order(site, order):
    distribution(
        site, "ours", "1.0", "[mergekit.merge_methods]\nsce = fusechat_methods:sce\nvarm = fusechat_methods:varm"
    )
    (site / "plugin-1.0.dist-info" / "entry_points.txt").write_text("")
    methods = "import mergekit.merge_methods\nfrom fusechat_merge import _autoload\n"
    methods += "sce, varm = object(), object()\n_autoload.register_waiting(__name__)\n"
    (site / "fusechat_methods.py").write_text(methods)
    code = f"{ORDERS[order]}\nprint(m.get('sce') is sce, m.get('varm') is varm)"
    assert python(site, code) == ("True True", "")


@pytest.mark.parametrize(
    ("module", "problem", "remedy"),
    [
        ("plan", "its mergekit.plan is not the one", "Write `dtype: float32` with the `out_dtype` you want"),
        ("merge", "its mergekit.merge is not the one", "Install mergekit 0.1.5, or a newer fusechat"),
    ],
)
def test_an_unknown_planner_or_merge_is_one_warning_with_the_remedy(site, module, problem, remedy):
    (site / "mergekit" / f"{module}.py").write_text("class Planner:\n    pass\n")
    out, err = python(site, f"import mergekit.{module}; print('goes on')")
    assert out == "goes on"
    assert err.count("RuntimeWarning") == 1
    assert problem in err
    assert remedy in err


def test_real_mergekit_serves_ours_when_our_module_comes_first(tmp_path):
    distribution(tmp_path, "fusechat", "0.1.0", POINTS)
    code = "from fusechat_merge.method import sce, varm; import mergekit.merge_methods as m\n"
    code += "from mergekit.plan import MergePlanner; from mergekit.merge import run_merge\n"
    code += "print(m.get('sce') is sce, m.get('varm') is varm, m.sce_merge is not sce, "
    code += "MergePlanner.patched_by_fusechat, run_merge.patched_by_fusechat)"
    assert python(tmp_path, code) == ("True True True True True", "")


def test_doctor_answers_without_importing_mergekit(tmp_path):
    distribution(tmp_path, "fusechat", "0.1.0", POINTS)
    code = "import sys, fusechat_merge.cli\nassert fusechat_merge.cli.main(['doctor']) == 0\n"
    code += "print({'mergekit', 'torch', 'numpy'} & sys.modules.keys())"
    out, err = python(tmp_path, code)
    assert "merge_method sce: served by fusechat_merge.method" in out
    assert out.endswith("set()")
    assert not err
