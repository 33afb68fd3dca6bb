"""What the project says of itself in several places is one thing: versions, floors, tiers of tests, citations."""

import configparser
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from fusechat_fuse.requirements import NEEDED

ROOT = Path(__file__).resolve().parents[1]
setup = configparser.ConfigParser()
setup.read(ROOT / "setup.cfg", encoding="utf-8")
CITATION = re.compile(r'docs/method\.md`?, "([^"]+)"((?:[:,] (?:`\w+`(?:, | and )?)+)?)')


def name_of(requirement: Requirement) -> str:
    return requirement.name.lower().replace("-", "_")


def requirements(text: str) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return {name_of(found): found for found in map(Requirement, filter(None, lines))}


DECLARED = requirements(setup["options"]["install_requires"] + setup["options.extras_require"]["test"])


def pinned(file: str) -> dict[str, str]:
    found = requirements((ROOT / file).read_text(encoding="utf-8"))
    return {name: str(requirement.specifier).removeprefix("==") for name, requirement in found.items()}


def test_the_lowest_set_is_what_is_declared():
    floors = {
        name: Version(part.version)
        for name, requirement in DECLARED.items()
        for part in requirement.specifier
        if part.operator == ">="
    }
    lowest = {name: Version(version) for name, version in pinned("constraints-lowest.txt").items()}
    assert lowest.pop("torch") >= floors.pop("torch")  # installed from one build; its floor was tried apart
    needed = Version(NEEDED["training"]["transformers"])  # 5.10.0 was never published
    assert lowest.pop("transformers").release[:2] == needed.release > floors.pop("transformers").release
    assert lowest == floors


def test_beside_any_mergekit_transformers_stays():
    of_mergekit = requirements("\n".join(metadata.requires("mergekit") or ()))["transformers"]
    lowest = min(Version(part.version) for part in of_mergekit.specifier if part.operator == ">=")
    assert str(lowest) in DECLARED["transformers"].specifier
    assert f" transformers=={lowest}" in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_tested_versions_are_allowed(file):
    for name, version in pinned(file).items():
        assert name not in DECLARED or version in DECLARED[name].specifier, name


def test_citation_has_the_required_keys_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors", "year"} <= paper.keys()
    assert [author["family-names"] for author in paper["authors"]] == ["Wan", "Zhong", "Yang", "Chen", "Quan"]
    version = setup["metadata"]["version"]
    assert citation["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["Makefile", "CONTRIBUTING.md"])
def test_the_fast_tier_leaves_out_every_marker(file):
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    markers = [marker.split(":")[0] for marker in options["markers"]]
    assert f'-m "{" and ".join(f"not {marker}" for marker in markers)}"' in (ROOT / file).read_text(encoding="utf-8")


def test_citations_of_the_method_name_its_sections_and_rules():
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^#+ (.+)$", method, re.MULTILINE))
    for path in [*ROOT.glob("fusechat_*/**/*.py"), ROOT / "CONTRIBUTING.md"]:
        text = " ".join(path.read_text(encoding="utf-8").split())
        for section, rules in CITATION.findall(text):
            assert section in sections, path
            for rule in re.findall(r"`\w+`", rules):
                assert rule in method, (path, rule)


def test_the_map_of_contributing_names_files_that_are_there():
    package, named = "", []
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| to change | open, in"):
            package = re.findall(r"`(\w+)`", line)[0]
        elif package and line.startswith("| "):
            named += [ROOT / package / path for path in re.findall(r"`([\w/]+\.py)`", line)]
    assert len(named) > 20
    assert not [path for path in named if not path.exists()]
