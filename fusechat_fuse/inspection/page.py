"""One aligned conversation as a self-contained HTML page: two tokenizations over one text, details on focus.

The page loads nothing from the network (a content policy forbids it), works by mouse and by keyboard (arrows move from
token to token, Home and End to the first and last), gives each class in words as well as in colour, and follows the
reader's light or dark setting. A button saves some tokens with their distributions as an SVG figure.
"""

from __future__ import annotations

import html
import json

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --exact: #1a7f37; --inside: #9a6700; --none: #cf222e; --dim: #59636e;
  --shade: #0969da; }
@media (prefers-color-scheme: dark) { :root { --exact: #3fb950; --inside: #d29922; --none: #f85149; --dim: #9aa4ae;
  --shade: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; display: grid; grid-template-columns: minmax(0, 1fr) 28rem; }
main { padding: 1.2rem; } h1 { font-size: 1.3rem; margin: 0 0 .4rem; } h2 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
aside { position: sticky; top: 0; height: 100vh; overflow: auto; padding: 1.2rem; border-left: 1px solid var(--line); }
aside h2:first-child { margin-top: 0; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--dim); border-left: 3px solid var(--line);
  margin: .3rem 0 .8rem; padding: .1rem .8rem; max-height: 14rem; overflow: auto;
  font: .85rem/1.45 ui-monospace, monospace; }
.text { display: flex; flex-wrap: wrap; row-gap: .6rem; font-family: ui-monospace, monospace; font-size: .9rem; }
.stretch { display: inline-flex; flex-direction: column; max-width: 100%; margin-right: 2px; }
.break { flex-basis: 100%; } .line { display: flex; flex-wrap: wrap; }
.token { flex: 1 0 auto; border: 1px solid var(--line); border-radius: 3px; padding: 0 3px; white-space: pre-wrap; }
.token { overflow-wrap: anywhere; text-align: center; min-width: .9rem; }
.pivot .token { cursor: pointer; border-bottom-width: 3px; --of: 0; }
.pivot .token, .scale { background: color-mix(in srgb, var(--shade) calc(var(--of) * 65%), transparent); }
body:has(#by-disagreement:checked) .pivot .token { --of: var(--disagreement, 0); }
body:has(#by-mass:checked) .pivot .token { --of: var(--mass, 0); }
.scale { background: linear-gradient(to right, transparent, color-mix(in srgb, var(--shade) 65%, transparent));
  display: inline-block; width: 4rem; height: .8rem; border: 1px solid var(--line); margin: 0 .4rem; }
.exact { border-bottom-color: var(--exact) !important; } .inside { border-bottom-color: var(--inside) !important; }
.none { border-bottom-color: var(--none) !important; }
.inside { border-bottom-style: dashed !important; } .none { border-bottom-style: dotted !important; }
.source .token { color: var(--dim); }
.token:focus { outline: 3px solid var(--shade); outline-offset: 1px; }
.answers { background: #ffd33d66; color: inherit !important; }
table { border-collapse: collapse; font-size: .85rem; margin: .3rem 0 1rem; } aside table { width: 100%; }
td, th { text-align: left; padding: .15rem .5rem .15rem 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.number { overflow-wrap: normal; } th.number { vertical-align: bottom; }
.why, .note { color: var(--dim); } .why { font-style: italic; } .note { font-size: .85rem; }
.legend span { margin-right: 1rem; border-bottom: 3px solid; padding: 0 3px; display: inline-block; }
fieldset { border: 0; padding: 0; margin: .6rem 0; } legend { float: left; margin-right: .8rem; }
fieldset label { margin-right: .8rem; white-space: nowrap; } fieldset .scale-row { white-space: nowrap; }
button { font: inherit; font-size: .85rem; padding: .2rem .7rem; }
@media (max-width: 60rem) { body { display: block; } aside { position: sticky; bottom: 0; top: auto; height: 38vh;
  padding: .6rem 1.2rem; background: Canvas; border-left: 0; border-top: 2px solid var(--line); } }
"""

_SCRIPT = """
const view = JSON.parse(document.getElementById("view").textContent);
const tokens = [...document.querySelectorAll(".pivot .token")];
const panel = document.getElementById("details");
let chosen = 0;
const make = (name, text, kind) => {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};
const table = (head, rows) => {  // the first column is text, numbers are right-aligned
  const node = make("table"), top = node.createTHead().insertRow();
  head.forEach((name, n) => {
    const cell = make("th", name, rows.length && rows[0][n].className);
    cell.scope = "col";
    top.append(cell);
  });
  const body = node.createTBody();
  for (const row of rows) body.insertRow().append(...row);
  return node;
};
const digits = (p) => p === null ? "\\u2013" : p > 0 && p < 5e-5 ? "< 0.0001" : p.toFixed(4);
const share = (p) => make("td", digits(p), "number");
const quoted = (text) => "\\u201c" + text + "\\u201d";
function show(n) {
  chosen = n;
  const token = view.tokens[n], source = token.answer >= 0 ? view.source_tokens[token.answer] : null;
  for (const node of document.querySelectorAll(".answers")) node.classList.remove("answers");
  if (source) document.getElementById("s" + token.answer).classList.add("answers");
  panel.replaceChildren(make("h2", "Pivot token " + quoted(token.text)));
  const words = { exact: "Starts where a source token starts", inside: "Starts inside a source token",
                  none: "Has no answer" }[token.class];
  panel.append(make("p", words + (source ? " (" + quoted(source.text) + ")" : "") +
    (token.safe ? "; a safe start" : "") + ". Mapped mass " + digits(token.mass) +
    (token.class === "exact" ? " of " + digits(token.kept) + " that the source kept" : "") +
    (token.disagreement === null ? "" : "; disagreement " + digits(token.disagreement)) + "."));
  if (source && source.before)
    panel.append(make("p", "The source's token begins with " + quoted(source.before) +
      ", which belongs to the chat template.", "note"));
  if (token.candidates.length) {
    panel.append(make("h2", "The source's candidates"));
    const rows = token.candidates.map((c) => [make("td", c.token + (c.actual ? " (actual)" : "")), share(c.p),
      c.became ? make("td", c.became) : make("td", c.why, "why")]);
    rows.push([make("td", "all others", "why"),
      share(Math.max(0, 1 - token.candidates.reduce((sum, c) => sum + c.p, 0))), make("td", "not kept", "why")]);
    panel.append(table(["candidate", "P", "became"], rows));
    const read = token.candidates.find((c) => c.actual);
    const own = token.compared.find(([name]) => read && name === read.became);
    if (own && own[1] < read.p - 5e-5)
      panel.append(make("p", "The pivot token spans several source tokens: its P is the product of theirs.", "note"));
  }
  panel.append(make("h2", "What the pivot is given, and what it predicts itself"));
  const rows = token.compared.map(([name, given, own]) => [make("td", name), share(given), share(own)]);
  rows.push([make("td", "all others", "why"), ...token.rests.map(share)]);
  panel.append(table(["pivot token", "given P", "own P"], rows));
  panel.append(make("p", "\\u2013: not among the kept tokens", "note"));
}
tokens.forEach((node, n) => {
  node.addEventListener("focus", () => {
    for (const other of tokens) other.tabIndex = -1;
    node.tabIndex = 0;
    show(n);
  });
  node.addEventListener("mouseenter", () => show(n));
  node.addEventListener("click", () => node.focus());
  node.addEventListener("keydown", (event) => {
    const step = { ArrowRight: n + 1, ArrowDown: n + 1, ArrowLeft: n - 1, ArrowUp: n - 1, Home: 0,
                   End: tokens.length - 1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    tokens[Math.min(Math.max(step, 0), tokens.length - 1)].focus();
  });
});
if (tokens.length) { tokens[0].tabIndex = 0; show(0); }

const HEIGHT = 20, MARGIN = 62, RANKS = 5;  // of a row of the figure and its labels, in pixels; entries of a column
const draw = (name, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
function figure(from, count) {  // whole stretches from a token on: both tokenizations, and what the pivot is given
  const all = view.messages.find((m) => m.stretches.some((s) => s.pivot.includes(from))).stretches;
  const stretches = [];
  let columns = 0, x = MARGIN;
  for (const stretch of all.slice(all.findIndex((s) => s.pivot.includes(from))))
    if (columns < count) columns += (stretches.push(stretch), stretch.pivot.length);
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = "12px monospace";
  const width = (text) => pen.measureText(text).width + 10;
  const svg = draw("svg", { "font-family": "monospace", "font-size": 12 });
  const box = (left, row, wide, text, fill, more) => svg.append(
    draw("rect", { x: left, y: row * HEIGHT + 1, width: wide - 2, height: HEIGHT - 2, "fill-opacity": fill, ...more }),
    draw("text", { x: left + (wide - 2) / 2, y: row * HEIGHT + 14, "text-anchor": "middle" }, text));
  ["source", "pivot", "given"].forEach((name, row) => svg.append(
    draw("text", { x: 0, y: row * HEIGHT + 14, "font-style": "italic" }, name)));
  const outline = { fill: "#0969da", stroke: "#656d76" };
  for (const stretch of stretches) {
    const cells = stretch.pivot.map((n) => view.tokens[n].row.slice(0, RANKS)
      .filter(([, p]) => p >= 0.005).map(([name, p]) => [name + " " + p.toFixed(2), p]));
    const names = stretch.source.map((q) => view.source_tokens[q].text);
    const least = names.length * Math.max(0, ...names.map(width)) / stretch.pivot.length;
    const widths = stretch.pivot.map((n, c) => Math.ceil(Math.max(least, width(view.tokens[n].text),
      ...cells[c].map(([text]) => width(text)))));
    const whole = widths.reduce((a, b) => a + b, 0);
    names.forEach((name, n) => box(x + n * whole / names.length, 0, whole / names.length, name, 0, outline));
    stretch.pivot.forEach((n, c) => {
      box(x, 1, widths[c], view.tokens[n].text, 0, outline);
      cells[c].forEach(([text, p], rank) =>
        box(x, 2 + rank, widths[c], text, (0.65 * p).toFixed(3), { fill: "#0969da" }));
      x += widths[c];
    });
  }
  for (const [name, size] of [["width", x], ["height", (2 + RANKS) * HEIGHT]]) svg.setAttribute(name, size);
  svg.setAttribute("viewBox", "0 0 " + x + " " + (2 + RANKS) * HEIGHT);
  return svg;
}
document.getElementById("save").addEventListener("click", () => {
  const text = new XMLSerializer().serializeToString(figure(chosen, 12)), link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  link.download = "alignment.svg";
  link.click();
  URL.revokeObjectURL(link.href);
});
"""
_FIGURES = (  # heading, key of the certificate, whether a share
    ("predicted tokens", "predicted_tokens", False),
    ("answered", "coverage", True),
    ("of these: exact", "exact", True),
    ("of these: inside a source token", "inside", True),
    ("of these: safe starts", "safe", True),
    ("mean mapped mass", "mean_mapped_mass", True),
    ("mean mass that the source kept", "mean_kept_mass", True),
    ("pivot, bits per byte", "pivot_bits_per_byte", False),
    ("source, bits per byte", "source_bits_per_byte", False),
    ("aligned, bits per byte", "aligned_bits_per_byte", False),
    ("gap, bits per byte", "gap_bits_per_byte", False),
)


def _stretch(view: dict, stretch: dict) -> str:
    """Two lines of tokens over the same text."""
    cells: dict[str, list[str]] = {"pivot": [], "source": []}
    for n in stretch["pivot"]:
        token = view["tokens"][n]
        label = html.escape(f"{token['text']}, {token['class']}{', safe' if token['safe'] else ''}")
        shades = ""
        if token["disagreement"] is not None:
            shades = f' style="--mass: {token["mass"]:.3f}; --disagreement: {token["disagreement"]:.3f}"'
        cells["pivot"].append(
            f'<span class="token {token["class"]}" id="p{n}" role="button" tabindex="-1" aria-label="{label}"{shades}>'
            f"{html.escape(token['text'])}</span>"
        )
    for n in stretch["source"]:
        cells["source"].append(f'<span class="token" id="s{n}">{html.escape(view["source_tokens"][n]["text"])}</span>')
    lines = "".join(f'<span class="line {side}">{"".join(of) or "&nbsp;"}</span>' for side, of in cells.items())
    ends = any("⏎" in view["tokens"][n]["text"] for n in stretch["pivot"])
    return f'<span class="stretch">{lines}</span>' + ('<span class="break"></span>' if ends else "")


def _figure_table(figures: dict[str, dict]) -> str:
    """This conversation's figures beside those of all data."""

    def cell(of: dict, key: str, share: bool) -> str:
        value = of.get(key)
        if value is None:
            return "–"
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:.2%}" if share else f"{value:.4f}".replace("-0.0000", "0.0000")

    rows = [
        f'<tr><th scope="row">{heading}</th>'
        + "".join(f'<td class="number">{cell(figures[of], key, share)}</td>' for of in ("conversation", "data"))
        + "</tr>"
        for heading, key, share in _FIGURES
    ]
    head = '<tr><th></th><th scope="col" class="number">this conversation</th>'
    return f'<table id="figures">{head}<th scope="col" class="number">all data</th></tr>{"".join(rows)}</table>'


def page(view: dict) -> str:
    """The page as a string.

    Args:
        view: `conversation_view.conversation_view` with the source's tokens.

    Returns:
        HTML without a single reference to another file.
    """
    pivot, source = (html.escape(str(name)) for name in view["models"])
    messages = []
    for n, message in enumerate(view["messages"]):
        drawn = "".join(_stretch(view, stretch) for stretch in message["stretches"])
        prompt = html.escape(message["before"].strip("\n"))
        messages.append(f'<h2>Prompt {n + 1}</h2><div class="prompt" tabindex="0">{prompt}</div>')
        messages.append(f'<h2>Answer {n + 1}</h2><div class="text">{drawn}</div>')
    kept = {name: view[name] for name in ("tokens", "source_tokens", "messages")}
    data = json.dumps(kept, ensure_ascii=False)
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    title = f"Alignment of {html.escape(str(view['id']))}"
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    shades = "".join(
        f'<label><input type="radio" name="shade" id="by-{name}"{checked}> {text}</label>'
        for name, text, checked in (
            ("disagreement", "disagreement", " checked"),
            ("mass", "mapped mass", ""),
            ("nothing", "nothing", ""),
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>Upper line: tokens of the pivot {pivot}. Lower line: tokens of the source {source}.
Mapping: {html.escape(view["mapping"])}. Tap a token, or move with the arrow keys.</p>
<p class="legend"><span class="exact">exact: both start here</span><span class="inside">inside a source token</span>
<span class="none">no answer</span></p>
<fieldset><legend>Shade by</legend>{shades}
<span class="scale-row">0<span class="scale"></span>1</span></fieldset>
<p class="note">Disagreement is the share of probability that the source, once mapped, and the pivot place on different
tokens. Mass is the source's probability that was mapped.</p>
{"".join(messages)}
<p><button id="save">Save 12 tokens from the chosen one as a figure (SVG)</button></p>
<h2>Figures</h2>
{_figure_table(view["figures"])}
</main>
<aside aria-live="polite" aria-label="Details of the chosen token" id="details"></aside>
<script type="application/json" id="view">{data}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""
