"""One aligned conversation as a self-contained HTML page: two tokenizations over one text, details on focus.

The page loads nothing from the network (a content policy forbids it), works by mouse and by keyboard (arrows move from
token to token, Home and End to the first and last), gives each class in words as well as in colour, and follows the
reader's light or dark setting.
"""

from __future__ import annotations

import html
import json

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --exact: #1a7f37; --inside: #9a6700; --none: #cf222e; --dim: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --exact: #3fb950; --inside: #d29922; --none: #f85149; --dim: #9aa4ae; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; display: grid; grid-template-columns: minmax(0, 1fr) 26rem; }
main { padding: 1.2rem; } h1 { font-size: 1.2rem; margin: 0 0 .4rem; } h2 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
pre { font-size: .85rem; white-space: pre-wrap; color: var(--dim); margin: .3rem 0; }
aside { position: sticky; top: 0; height: 100vh; overflow: auto; padding: 1.2rem; border-left: 1px solid var(--line); }
.text { display: flex; flex-wrap: wrap; row-gap: .6rem; font-family: ui-monospace, monospace; font-size: .9rem; }
.stretch { display: inline-flex; flex-direction: column; max-width: 100%; margin-right: 2px; }
.break { flex-basis: 100%; } .line { display: flex; flex-wrap: wrap; }
.token { flex: 1 0 auto; border: 1px solid var(--line); border-radius: 3px; padding: 0 3px; white-space: pre-wrap; }
.token { overflow-wrap: anywhere; text-align: center; min-width: .9rem; }
.pivot .token { cursor: pointer; border-bottom-width: 3px; }
.exact { border-bottom-color: var(--exact) !important; } .inside { border-bottom-color: var(--inside) !important; }
.none { border-bottom-color: var(--none) !important; }
.inside { border-bottom-style: dashed !important; } .none { border-bottom-style: dotted !important; }
.source .token { color: var(--dim); }
.token:focus { outline: 3px solid #0969da; outline-offset: 1px; }
.answers { background: #ffd33d66; color: inherit !important; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; margin: .3rem 0 1rem; }
td, th { text-align: left; padding: .15rem .3rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; overflow-wrap: normal; }
.why { color: var(--dim); font-style: italic; }
.legend span { margin-right: 1rem; border-bottom: 3px solid; padding: 0 3px; }
@media (max-width: 60rem) { body { display: block; } aside { position: sticky; bottom: 0; top: auto; height: 45vh;
  background: Canvas; border-left: 0; border-top: 2px solid var(--line); } }
"""

_SCRIPT = """
const view = JSON.parse(document.getElementById("view").textContent);
const tokens = [...document.querySelectorAll(".pivot .token")];
const panel = document.getElementById("details");
const make = (name, text, kind) => {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};
const table = (head, rows) => {
  const node = make("table"), top = node.createTHead().insertRow();
  for (const name of head) { const cell = make("th", name); cell.scope = "col"; top.append(cell); }
  const body = node.createTBody();
  for (const row of rows) { const line = body.insertRow(); for (const cell of row) line.append(cell); }
  return node;
};
const share = (value) => make("td", value.toFixed(4), "number");
function show(n) {
  const token = view.tokens[n];
  for (const node of document.querySelectorAll(".answers")) node.classList.remove("answers");
  const answer = document.getElementById("s" + token.answer);
  if (answer) answer.classList.add("answers");
  panel.replaceChildren(make("h2", "Pivot token \\u201c" + token.text + "\\u201d"));
  const source = token.answer >= 0 ? view.source_tokens[token.answer].text : null;
  const words = { exact: "starts where a source token starts", inside: "starts inside a source token",
                  none: "has no answer" }[token.class];
  panel.append(make("p", words + (source === null ? "" : " (\\u201c" + source + "\\u201d)") +
    (token.safe ? "; a safe start" : "")));
  panel.append(make("p", "Mapped mass " + token.mass.toFixed(4) + "; unmapped of the source's candidates " +
    token.unmapped.toFixed(4)));
  if (token.candidates.length) {
    panel.append(make("h2", "The source's candidates"));
    panel.append(table(["candidate", "P", "became"], token.candidates.map((c) => [
      make("td", c.token + (c.actual ? " (actual)" : "")), share(c.p),
      c.became ? make("td", c.became) : make("td", c.why, "why")])));
  }
  panel.append(make("h2", "What the pivot is given"));
  panel.append(table(["pivot token", "P"], token.row.map(([name, p]) => [make("td", name), share(p)])));
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
"""


def _stretch(view: dict, stretch: dict) -> str:
    """Two lines of tokens over the same text."""
    cells: dict[str, list[str]] = {"pivot": [], "source": []}
    for n in stretch["pivot"]:
        token = view["tokens"][n]
        label = html.escape(f"{token['text']}, {token['class']}{', safe' if token['safe'] else ''}")
        cells["pivot"].append(
            f'<span class="token {token["class"]}" id="p{n}" role="button" tabindex="-1" aria-label="{label}">'
            f"{html.escape(token['text'])}</span>"
        )
    for n in stretch["source"]:
        cells["source"].append(f'<span class="token" id="s{n}">{html.escape(view["source_tokens"][n]["text"])}</span>')
    lines = "".join(f'<span class="line {side}">{"".join(of) or "&nbsp;"}</span>' for side, of in cells.items())
    ends = any("⏎" in view["tokens"][n]["text"] for n in stretch["pivot"])
    return f'<span class="stretch">{lines}</span>' + ('<span class="break"></span>' if ends else "")


def page(view: dict, summary: list[str]) -> str:
    """The page as a string.

    Args:
        view: `conversation_view.conversation_view` with the source's tokens.
        summary: lines of the certificate.

    Returns:
        HTML without a single reference to another file.
    """
    pivot, source = (html.escape(str(name)) for name in view["models"])
    messages = []
    for n, stretches in enumerate(view["messages"]):
        drawn = "".join(_stretch(view, stretch) for stretch in stretches)
        messages.append(f'<h2>Answer {n + 1}</h2><div class="text">{drawn}</div>')
    data = json.dumps({"tokens": view["tokens"], "source_tokens": view["source_tokens"]}, ensure_ascii=False)
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    title = f"Alignment of {html.escape(str(view['id']))}"
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
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
Mapping: {html.escape(view["mapping"])}. Move with the arrow keys.</p>
<p class="legend"><span class="exact">exact: both start here</span><span class="inside">inside a source token</span>
<span class="none">no answer</span></p>
<pre>{html.escape(chr(10).join(summary))}</pre>
{"".join(messages)}
</main>
<aside aria-live="polite" aria-label="Details of the chosen token" id="details"></aside>
<script type="application/json" id="view">{data}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""
