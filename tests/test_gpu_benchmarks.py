"""The GPU benchmarks run whole on a CPU, on their small shapes, with their own checks (bench_sce takes too long)."""

import importlib
import json
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("loss", {"plain", "dense", "ours"}),
        ("step", {"none", "plain", "lean", "full", "dense"}),
        ("capture", {None}),
    ],
)
def test_a_table_is_printed_and_saved(tmp_path, monkeypatch, capsys, name, ways):
    module = importlib.import_module(f"tests.benchmarks.gpu.bench_{name}")
    monkeypatch.setattr(sys, "argv", [f"bench_{name}", "--save", str(tmp_path)])
    module.main()
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    assert {line.get("way") for line in saved["lines"]} == ways
    assert saved["benchmark"] == name
    assert len(capsys.readouterr().out.splitlines()) > len(ways)
