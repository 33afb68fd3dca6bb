"""mergekit's own test suite, with the start-up hook and without: `python tests/peers/mergekit_suite.py`.

Fetches mergekit's source distribution with pip (the network is needed; the tests themselves run offline), unpacks its
tests and runs them twice in this environment, where mergekit of that version and fusechat are installed. Prints both
counts. Exit code 0 where every test ends as it does without the hook, and those that only the hook brings pass, 1 where
one does not, 2 where the suite cannot be fetched or run. Arguments are passed on to pytest.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

VERSION = "0.1.5"


def fetch(directory: Path) -> Path:
    """The suite, unpacked: a directory with `tests` and none of mergekit's own code, which is the installed one."""
    options = ["--no-binary", ":all:", "--no-deps", "--dest", str(directory), f"mergekit=={VERSION}"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options], check=True)
    [archive] = directory.glob("mergekit-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(directory, filter="data")
    suite = directory / "suite"
    shutil.move(directory / f"mergekit-{VERSION}" / "tests", suite / "tests")
    (suite / "tests" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("mergekit_common.py"), suite / "tests" / "common.py")
    return suite


def run(suite: Path, hook: bool, arguments: list[str]) -> dict[str, str]:
    """Test -> "passed", "failed", "error" or "skipped", with the hook on or off; which it was is looked at."""
    environment = os.environ | {"FUSECHAT_MERGE_AUTOLOAD": "1" if hook else "0", "HF_HUB_OFFLINE": "1"}
    code = "from mergekit.merge_methods import registry; print(type(registry.get('sce')).__module__)"
    served = subprocess.run([sys.executable, "-c", code], env=environment, cwd=suite, capture_output=True, text=True)
    if served.stdout.strip().startswith("fusechat_merge") != hook:
        sys.exit(f"sce is served by {served.stdout.strip() or served.stderr}: install fusechat in this environment")
    results = suite / f"results-{hook}.xml"
    pytest = [sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
    subprocess.run([*pytest, *arguments], cwd=suite, env=environment, check=False)
    outcomes = {}
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = min(kinds, default="passed")
    return outcomes


def main() -> int:
    if importlib.metadata.version("mergekit") != VERSION:
        print(f"mergekit {VERSION} is to be installed, not {importlib.metadata.version('mergekit')}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        try:
            suite = fetch(Path(directory))
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            print(f"mergekit's source distribution cannot be had: {error}", file=sys.stderr)
            return 2
        without, having = (run(suite, hook, sys.argv[1:]) for hook in (False, True))
    for name, outcomes in (("without the hook", without), ("with the hook", having)):
        print(f"{name}: {len(outcomes)} tests, {dict(Counter(outcomes.values()))}")
    tests = sorted(without.keys() | having.keys())  # some run once for each method there is: `varm` adds its own
    changed = [test for test in tests if having.get(test) != without.get(test, "passed")]
    for test in tests:
        if having.get(test) != without.get(test):
            print(f"differs: {test}: {without.get(test, 'not there')} without the hook, {having.get(test)} with it")
    return 1 if changed or not without else 0


if __name__ == "__main__":
    sys.exit(main())
