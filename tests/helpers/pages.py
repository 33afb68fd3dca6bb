"""A page read by `html.parser`: what a test compares with the JSON that the page was made from."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Texts of a page, in order.

    Attributes:
        headings: of h2. paragraphs: of p. tables: of each its rows, lists of cells. best: the cells in bold. charts: of
        each svg its texts. addresses: what the page refers to, places of its own left out. ids: of elements.
    """

    def __init__(self, text: str):
        super().__init__()
        self.headings, self.paragraphs, self.best = [], [], []
        self.tables, self.charts, self.addresses, self.ids = [], [], [], []
        self._open, self._text = [], ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))
        self._text = ""
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag == "svg":
            self.charts.append([])
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action") and not (value or "").startswith("#"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_data(self, data):
        self._text += data

    def handle_endtag(self, tag):
        name, attrs = self._open.pop()
        assert name == tag
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._text)
            self.best += [self._text] if attrs.get("class") == "best" else []
        elif tag == "text":
            self.charts[-1].append(self._text)
        elif tag in ("h2", "p"):
            {"h2": self.headings, "p": self.paragraphs}[tag].append(self._text)

    def table_of(self, *head: str) -> dict[str, list[str]]:
        """The rows of the first table whose head begins so, by their first cell."""
        found = next(table for table in self.tables if table and tuple(table[0][: len(head)]) == head)
        return {name: cells for name, *cells in found[1:]}
