"""Inline SVG from matplotlib figures: small, without identifiers that clash, coloured by the page's CSS.

Matplotlib draws with stand-in colours; here each becomes a CSS variable, so that one drawing serves light,
dark and print. Text stays text: it is small, can be selected, and takes the page's font.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
import xml.etree.ElementTree as ET  # parses only what matplotlib wrote a moment ago
from collections.abc import Iterator
from typing import Any

# Stand-in colour to the page's CSS variable. The values mean nothing but must differ.
INK, MUTED, LINE, CARD = "#010101", "#020202", "#030303", "#040404"
DENSE, PRUNED, RECOVERED, ONNX, GRAPH = "#050505", "#060606", "#070707", "#080808", "#090909"
QUANTIZED = "#0a0a0a"
SERIES = tuple(f"#{place:02x}{place:02x}{place:02x}" for place in range(16, 24))  # lines that are told apart
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    CARD: "--card",
    DENSE: "--dense",
    PRUNED: "--pruned",
    RECOVERED: "--recovered",
    QUANTIZED: "--quantized",
    ONNX: "--onnx",
    GRAPH: "--graph",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}
_XLINK = "{http://www.w3.org/1999/xlink}"
_DROPPED = ("font-family", "stroke-linejoin", "stroke-miterlimit", "stroke-linecap")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def variable(colour: str) -> str:
    """The page's CSS variable that a stand-in colour becomes."""
    return _VARIABLES[colour]


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's own defaults, whatever the user's are; names are never read as mathematics; no chatter."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # the font cache of a first import announces itself
    try:
        import matplotlib.style

        with matplotlib.style.context("default"), warnings.catch_warnings():
            # Matplotlib's font only measures words, the page's font draws them: a sign it lacks is no harm.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
            matplotlib.rcParams.update(
                {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "blockpress"}
            )
            yield
    finally:
        log.setLevel(level)


def inline_svg(figure: Any, name: str, description: str) -> str:
    """An ``<svg>`` element for an HTML page, described by ``description`` for those who cannot see it.

    Args:
        figure: A matplotlib ``Figure``, drawn with this module's colours.
        name: Prefix of every identifier inside, unique on the page.
        description: What the drawing shows, in words.
    """
    root = ET.fromstring(_matplotlib_svg(figure))
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style", "title"):
                parent.remove(child)
    references = {
        target
        for element in root.iter()
        for value in element.attrib.values()
        for target in re.findall(r"url\(#([^)]+)\)|^#(.+)$", value)
        for target in target
        if target
    }
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = dict(_attributes(element, name, references))
        element.tail = None
        if element.tag != "text":
            element.text = None
    box = root.attrib["viewBox"]
    root.attrib = {"viewBox": box, "role": "img", "aria-label": description, "class": f"plot {name}"}
    return ET.tostring(root, encoding="unicode")


def _matplotlib_svg(figure: Any) -> str:
    stream = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return stream.getvalue()


def _local(tag: str) -> str:
    """A tag or attribute name without its namespace."""
    return tag.rpartition("}")[2]


def _attributes(element: ET.Element, name: str, references: set[str]) -> list[tuple[str, str]]:
    """The attributes worth keeping: prefixed identifiers, short numbers, page colours."""
    kept = []
    for key, value in element.attrib.items():
        if key == "id":
            if value in references:
                kept.append(("id", f"{name}-{value}"))
        elif key == f"{_XLINK}href" and value.startswith("#"):
            kept.append(("href", f"#{name}-{value[1:]}"))
        elif _local(key) == "href" or not key.startswith("{"):
            value = value.replace("url(#", f"url(#{name}-")
            kept.append((_local(key), _style(value) if key == "style" else _short(value)))
    return kept


def _style(style: str) -> str:
    """A style attribute in the page's colours and font."""
    declarations = []
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":
            size = re.search(r"[\d.]+px", value)
            weight = "bold" if re.search(r"\b(bold|[6-9]00)\b", value) else None
            declarations += [f"font-size:{size[0]}"] if size else []
            declarations += [f"font-weight:{weight}"] if weight else []
        elif key and key not in _DROPPED:
            colour = _VARIABLES.get(value)
            declarations.append(f"{key}:var({colour})" if colour else f"{key}:{_short(value)}")
    return ";".join(declarations)


def _short(value: str) -> str:
    """``value`` with numbers cut to two decimals and line breaks gone; embedded images stay as they are."""
    if value.startswith("data:"):
        return re.sub(r"\s+", "", value)
    return " ".join(
        _LONG_NUMBER.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value).split()
    )
