"""`inspect`: what a terminal shows, and the page: its structure, and its behaviour in headless Chromium."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from fusechat_fuse.alignment.combination import combine
from fusechat_fuse.alignment.run import align
from fusechat_fuse.errors import InputError
from fusechat_fuse.inspection.conversation_view import _row, conversation_view, readable
from fusechat_fuse.inspection.run import inspect_path
from fusechat_fuse.store.shards import load_representation
from tests.helpers.alignment_data import make_row, rows_for, write

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, tiny_bpe, tiny_unigram):
    folder = tmp_path_factory.mktemp("inspect")
    write(folder / "pivot", tiny_bpe, rows_for(tiny_bpe))
    write(folder / "source", tiny_unigram, rows_for(tiny_unigram, seed=1))
    for mapping in ("prefix", "statistics"):
        align(folder / "pivot", folder / "source", folder / mapping, mapping=mapping, cache_dir=folder / "cache")
    return folder


def test_terminal(aligned):
    text = inspect_path(aligned / "prefix", row=1)
    assert "10 conversations" in text
    assert "coverage 100.00 %" in text
    assert "conversation c1, prefix mapping" in text
    assert re.search(r"exact safe\s+mass 0\.\d+", text)
    assert inspect_path(aligned / "prefix", row="c1") == text
    text = inspect_path(aligned / "pivot", row="c2", tokens=3)
    assert "conversation c2" in text
    assert "more predicted tokens" in text


@pytest.mark.parametrize("function", ["min_ce", "avg_ce"])
def test_of_a_combination_it_shows_the_combination_and_who_won(function, aligned, tiny_unigram, tmp_path):
    rows = rows_for(tiny_unigram, seed=2)
    for n, row in enumerate(rows):  # better and worse by turns
        row["ce"] = row["ce"] + np.float32(9) if n % 2 else row["ce"] * np.float32(0.01)
    write(tmp_path / "source2", tiny_unigram, rows)
    align(aligned / "pivot", tmp_path / "source2", tmp_path / "other", cache_dir=aligned / "cache")
    manifest = combine([aligned / "prefix", tmp_path / "other"], tmp_path / "both", function=function, ce_unit="token")
    names, opened, won = ["made up#1", "made up#2"], load_representation(tmp_path / "both"), set()
    for n, row in enumerate(opened):
        text = inspect_path(tmp_path / "both", row=n, tokens=3)
        index = int(row["source_index"][0])
        won.add(index)
        if function == "min_ce":
            assert f"conversation c{n}, taken from source {index}, {names[index]}; " in text
            assert all(
                f"source {j}: {name}, taken {manifest['taken'][name]} times" in text for j, name in enumerate(names)
            )
        else:
            assert f"conversation c{n}, a mixture of its sources; " in text
        assert f"cross-entropy {row['source_ce']:.4f} (pivot {row['ce'].mean(dtype=float):.4f}) nats per token" in text
        shown = [line for line in text.splitlines() if " mass " in line]
        for line, mass, probs in zip(shown, row["mapped_mass"], row["source_probs"], strict=False):
            assert f"mass {mass:.3f} " in line
            assert f" {probs.max():.3f}" in line
    assert won == ({0, 1} if function == "min_ce" else {-1})


def test_a_probability_is_rounded_once():
    probs = np.array([0.7875, -1], np.float32) + np.float32(3e-8)  # just above the middle of 0.787 and 0.788
    ((_, shown),) = _row(np.array([1, -1]), probs, str)
    assert f"{shown:.3f}" == f"{probs[0]:.3f}" == "0.788"


def test_terminal_without_the_source(aligned, tmp_path):
    shutil.copytree(aligned / "prefix", tmp_path / "moved")
    file = tmp_path / "moved" / "manifest.json"
    file.write_text(file.read_text().replace(str(aligned / "source"), "gone"))
    assert "answered" in inspect_path(tmp_path / "moved", row=1)
    with pytest.raises(InputError, match="aligned from at gone, got nothing readable"):
        inspect_path(tmp_path / "moved", row=1, html=tmp_path / "x.html")
    assert "page written" in inspect_path(
        tmp_path / "moved", html=tmp_path / "x.html", source_representation=aligned / "source"
    )


@pytest.mark.parametrize("row", ["c99", 10, -11, "x"])
def test_no_such_row(row, aligned):
    with pytest.raises(InputError, match="expected a number below 10 or an id"):
        inspect_path(aligned / "prefix", row=row)


def test_page_only_of_aligned_data(aligned, tmp_path):
    with pytest.raises(InputError, match="expected an aligned directory"):
        inspect_path(aligned / "pivot", html=tmp_path / "x.html")


def test_a_page_that_cannot_be_written_leaves_nothing(aligned, tmp_path):
    with pytest.raises(InputError, match=r"path for .*nowhere/x.html: expected it to be there, got nothing"):
        inspect_path(aligned / "prefix", html=tmp_path / "nowhere" / "x.html")
    with pytest.raises(InputError, match="expected a file's name"):
        inspect_path(aligned / "prefix", html=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_readable():
    assert readable(b" a\n\t\r") == "·a⏎⇥␍"
    assert readable("你".encode()[:2]) == "\\xe4\\xbd"
    assert readable(None) == "(special)"
    assert readable("\u202e".encode()) == "\\u202e"  # turns the direction of text: not printed as it is


@pytest.mark.parametrize("mapping", ["prefix", "statistics"])
def test_view_accounts_for_every_candidate(mapping, aligned):
    opened = load_representation(aligned / mapping)
    stored = opened[9]
    view = conversation_view(opened, 9)
    assert len(view["tokens"]) == len(stored["predicted"])
    (message,) = view["messages"]
    numbers = [n for stretch in message["stretches"] for n in stretch["pivot"]]
    assert numbers == list(range(len(view["tokens"])))
    for n, token in enumerate(view["tokens"]):
        row = {name for name, _ in token["row"]}
        lost = sum(c["p"] for c in token["candidates"] if not c["became"])
        assert lost == pytest.approx(token["unmapped"], abs=1e-4)
        for c in token["candidates"]:
            assert bool(c["became"]) != bool(c["why"])
            if token["class"] != "none" and c["became"] and c["p"] > 0:
                assert c["became"] in row
        assert len(token["row"]) == (stored["source_ids"][n] >= 0).sum()
        assert sorted(token["row"]) == sorted((name, p) for name, p, _ in token["compared"] if p is not None)
        if mapping == "prefix" and token["class"] == "exact":
            assert token["kept"] >= sum(c["p"] for c in token["candidates"]) - 1e-6
            assert token["mass"] + token["unmapped"] <= token["kept"] + 1e-3
    assert {token["class"] for token in view["tokens"]} >= {"exact"}


@pytest.mark.parametrize("mapping", ["prefix", "statistics"])
def test_disagreement_is_the_total_variation_of_what_is_known(mapping, aligned):
    opened = load_representation(aligned / mapping)
    for token in conversation_view(opened, 9)["tokens"]:
        if token["class"] == "none":
            assert token["disagreement"] is None
            continue
        given, own = (
            np.array([*(entry[side] or 0.0 for entry in token["compared"]), rest])
            for side, rest in zip((1, 2), token["rests"])
        )
        assert given.sum() == pytest.approx(1, abs=2e-3)
        assert own.sum() == pytest.approx(1, abs=2e-3)
        assert token["disagreement"] == pytest.approx(np.abs(given - own).sum() / 2, abs=2e-3)
    own = conversation_view(load_representation(aligned / "prefix"), 9)["tokens"][0]["compared"]
    first = opened[9]
    most_likely = float(np.exp(first["topk_logprobs"][0].astype(float)).max())
    assert max(p for *_, p in own if p is not None) == pytest.approx(most_likely)


def test_figures_of_conversations_add_up_to_those_of_the_data(aligned):
    opened = load_representation(aligned / "prefix")
    figures = [conversation_view(opened, n)["figures"] for n in range(len(opened))]
    here, data = [of["conversation"] for of in figures], opened.manifest["certificate"]["all"]
    assert all(of["data"] == data for of in figures)
    assert sum(of["predicted_tokens"] for of in here) == data["predicted_tokens"]
    for share, of in (("coverage", "predicted_tokens"), ("source_bits_per_byte", "covered_bytes")):
        mean = np.average([one[share] for one in here], weights=[one[of] for one in here])
        assert mean == pytest.approx(data[share])
    row = opened[2]
    bits = row["ce"].sum(dtype=float) / np.log(2) / (row["end"] - row["start"]).sum()
    assert here[2]["pivot_bits_per_byte"] == pytest.approx(bits)


def test_the_text_before_each_answer_is_shown(tiny_bpe, tiny_unigram, tmp_path):
    for role, tokenizer in (("pivot", tiny_bpe), ("source", tiny_unigram)):
        more = {"header": "Say <yes>:\n", "end_of_turn": tokenizer.eos_token_id, "K": 5, "seed": 0}
        write(tmp_path / role, tokenizer, [make_row(tokenizer, "c0", ["yes", "no"], **more)])
    align(tmp_path / "pivot", tmp_path / "source", tmp_path / "out", mapping="prefix", cache_dir=tmp_path / "cache")
    inspect_path(tmp_path / "out", html=tmp_path / "x.html")
    page = Structure()
    page.feed((tmp_path / "x.html").read_text())
    assert [text.strip() for text in page.prompts] == ["Say <yes>:", "Say <yes>:"]


class Structure(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.open, self.links, self.buttons, self.data = [], [], [], [], ""
        self.prompts, self.cells = [], []  # texts of prompts; rows of the table of figures

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [value for name, value in attrs.items() if name in ("src", "href", "srcset", "action")]
        self.buttons += [attrs] if attrs.get("role") == "button" else []
        self.prompts += [""] if attrs.get("class") == "prompt" else []
        self.cells += [[]] if tag == "tr" else []

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][1].get("id") == "view":
            self.data += data
        if self.open and self.open[-1][1].get("class") == "prompt":
            self.prompts[-1] += data
        if self.open and self.open[-1][0] in ("td", "th"):
            self.cells[-1].append(data)


class Drawing(HTMLParser):
    """The figures of a page: attributes and texts of each svg."""

    def __init__(self):
        super().__init__()
        self.drawings, self.inside = [], ""

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        if tag == "svg":
            self.drawings.append((dict(attrs), []))

    def handle_data(self, data):
        if self.inside == "text":
            self.drawings[-1][1].append(data)


def test_page_structure(aligned, tmp_path):
    file = tmp_path / "page.html"
    inspect_path(aligned / "prefix", row="c3", html=file)
    text = file.read_text()
    page = Structure()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")  # a name, never asked
    assert len(page.ids) == len(set(page.ids))
    view = json.loads(page.data)
    assert len(page.buttons) == len(view["tokens"])
    assert all(button["aria-label"] and "tabindex" in button for button in page.buttons)
    assert "default-src 'none'" in text
    for button, token in zip(page.buttons, view["tokens"]):
        shown = dict(part.split(": ") for part in button.get("style", "").split("; ") if part)
        expected = (
            {} if token["disagreement"] is None else {"mass": token["mass"], "disagreement": token["disagreement"]}
        )
        assert shown == {f"--{name}": f"{value:.3f}" for name, value in expected.items()}
    figures = conversation_view(load_representation(aligned / "prefix"), 3)["figures"]
    rows = {name: tuple(values) for name, *values in page.cells[1:]}
    here, data = figures["conversation"], figures["data"]
    assert rows["predicted tokens"] == (str(here["predicted_tokens"]), str(data["predicted_tokens"]))
    assert rows["answered"] == (f"{here['coverage']:.2%}", f"{data['coverage']:.2%}")
    assert rows["pivot, bits per byte"] == (f"{here['pivot_bits_per_byte']:.4f}", "–")
    for name in ("source", "aligned"):
        assert rows[f"{name}, bits per byte"] == tuple(f"{of[f'{name}_bits_per_byte']:.4f}" for of in (here, data))


def test_page_escapes_what_it_shows(tiny_bpe, tiny_unigram, tmp_path):
    name = "</script><img src=x onerror=alert(1)>"
    for role, tokenizer in (("pivot", tiny_bpe), ("source", tiny_unigram)):
        write(tmp_path / role, tokenizer, rows_for(tokenizer, names=[name, *(f"c{n}" for n in range(9))]))
    align(tmp_path / "pivot", tmp_path / "source", tmp_path / "out", mapping="prefix", cache_dir=tmp_path / "cache")
    inspect_path(tmp_path / "out", html=tmp_path / "x.html")
    page = Structure()
    page.feed((tmp_path / "x.html").read_text())
    assert page.open == []
    assert page.links == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; the structure is checked without it")
def test_page_in_chromium_by_keyboard(aligned, tmp_path):
    file = tmp_path / "page.html"
    inspect_path(aligned / "prefix", row="c9", html=file)
    keys = """
    <script>
    const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    document.querySelector('.pivot .token[tabindex="0"]').focus();
    press("ArrowRight"); press("ArrowRight"); press("ArrowLeft");
    const shade = () => getComputedStyle(document.getElementById("p1")).backgroundColor;
    const shades = [shade(), document.getElementById("by-mass").click() ?? shade()];
    document.title = [document.activeElement.id, document.querySelectorAll("#details tr").length,
      document.querySelectorAll(".answers").length, shades[0] !== shades[1]].join(" ");
    press("End");
    document.title += " " + document.activeElement.id;
    document.body.append(figure(3, 2));
    </script></body>"""
    file.write_text(file.read_text().replace("</body>", keys))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    where, rows, answers, shaded, last = title[1].split()
    view = conversation_view(load_representation(aligned / "prefix"), 9)
    assert where == "p1"
    assert int(rows) > 6
    assert answers == "1"
    assert shaded == "true"
    assert last == f"p{len(view['tokens']) - 1}"
    drawing = Drawing()
    drawing.feed(done.stdout)
    ((drawn, texts),) = drawing.drawings
    assert float(drawn["width"]) > 100
    stretches = [s for s in view["messages"][0]["stretches"] if s["pivot"] and s["pivot"][-1] >= 3]
    pivot = stretches[0]["pivot"] + (stretches[1]["pivot"] if len(stretches[0]["pivot"]) < 2 else [])
    expected = [view["tokens"][n]["text"] for n in pivot]
    expected += [f"{name} {p:.2f}" for n in pivot for name, p in view["tokens"][n]["row"][:5] if p >= 0.005]
    assert set(expected) <= set(texts)


def test_another_source_than_the_aligned_one_is_refused(aligned, tiny_unigram, tmp_path):
    other = write(tmp_path / "other", tiny_unigram, rows_for(tiny_unigram, seed=7))
    with pytest.raises(InputError, match=r"aligned from at .*other, got another representation"):
        inspect_path(aligned / "prefix", html=tmp_path / "x.html", source_representation=other.path)
    assert not (tmp_path / "x.html").exists()


def test_bytes_per_token_are_those_of_the_shards(aligned):
    counts = load_representation(aligned / "prefix").manifest["counts"]
    size = sum(file.stat().st_size for file in (aligned / "prefix").glob("*.arrow"))
    assert counts["bytes"] == size
    shown = f"shards: {size / 1e6:.2f} MB, {size / counts['predicted_tokens']:.1f} bytes per predicted token"
    assert shown in inspect_path(aligned / "prefix")
