"""What a page shows, read by an HTML parser."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = {"meta", "br"}
LOADS = {"src", "href", "srcset", "data", "action"}
"""Attributes that make a browser fetch something."""


class Page(HTMLParser):
    """A page whose tags are in order, and that needs no other file; else an AssertionError."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.captions: list[str] = []
        self.legend: list[str] = []
        self.code: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._parts: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        assert not re.search(r"(url\(|@import )['\"]?(?!#)[a-z/.]", text), "it loads something"
        assert "http" not in text
        self.pictures = [
            ElementTree.fromstring(picture)
            for picture in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
        ]

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            assert name not in LOADS or value.startswith("#"), f"{tag} loads {value}"
        if tag not in VOID:
            self._open.append(tag)
            self._parts = []

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> inside {self._open}"
        self._open.pop()
        lists = {
            "td": self.cells,
            "th": self.cells,
            "figcaption": self.captions,
            "li": self.legend,
            "code": self.code,
            **dict.fromkeys(("h1", "h2", "h3"), self.headings),
        }
        if tag in lists:
            lists[tag].append("".join(self._parts).strip())

    def handle_data(self, data):
        self._parts.append(data)
        if "style" not in self._open:
            self.text += data

    def drawn(self) -> list[str]:
        """What each picture is called that has a curve or bar in it."""
        return [p.get("aria-label") for p in self.pictures if len(list(p.iter("path"))) > 5]
