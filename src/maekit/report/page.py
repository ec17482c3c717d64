"""One self-contained HTML file: text, facts, figures, tables, commands.

Nothing is loaded from anywhere: pictures are ``data:`` addresses, drawings are inline SVG, there is no script, and a
content security policy makes the browser refuse whatever a mistake might let in. All text is escaped by the template;
the only raw part are drawings of `maekit.report.plots`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from maekit import __version__
from maekit.errors import clean
from maekit.report.files import write_whole
from maekit.report.grids import data_uri

Cell = str | int | float | None


@dataclass(frozen=True)
class Figure:
    """A picture or a drawing.

    Attributes:
        content: PIL image, or ``<svg>`` text of `maekit.report.plots` (goes into the page as it is).
        caption: what is to be seen; also the text for those who see nothing.
    """

    content: Image.Image | str
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers.

    Attributes:
        highlight: rows to set in bold, from 0.
        note: small print underneath.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    highlight: Sequence[int] = ()


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order; text between `backticks` is set as code.

    Attributes:
        commands: blocks of code to be copied.
        details: title -> long text, folded away until somebody asks.
    """

    heading: str
    text: Sequence[str] = ()
    facts: Mapping[str, Cell] | None = None
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()
    details: Mapping[str, str] | None = None


def write_report(path: Path | str, *, title: str, intro: str | Sequence[str] = (), sections: Sequence[Section]) -> None:
    """Write the page; the file is whole or absent.

    Args:
        path: usually ``report.html``; folders are made.
        title: heading and name of the page.
        intro: paragraphs under the title.
        sections: the rest; empty parts leave no trace.

    Raises:
        MaekitError: E-ENV-OUT if the place cannot be written.
    """
    html = render(title=title, intro=[intro] if isinstance(intro, str) else list(intro), sections=sections)
    html = _without_home(html)
    # names of files may hold halves of surrogate pairs, which UTF-8 has no bytes for
    write_whole(Path(path), html.encode("utf-8", errors="replace"))


def _without_home(html: str) -> str:
    """Write the user's own folder as ~ in paths: pages are shown to others. Commands stay what they are in a shell."""
    home = str(escape(str(Path.home())))
    if home.count("/") < 1 or home == "/":
        return html
    beginning = rf"(?<![\w+/=.~-])(&#39;)?{re.escape(home)}/"  # never inside a picture's letters, or a longer path
    return re.sub(beginning, lambda found: f"~/{found[1] or ''}", html)


def render(*, title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the page as text."""
    environment = Environment(
        loader=PackageLoader("maekit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"prose": prose, "cell": cell, "figure": figure, "is_number": is_number}
    written = f"maekit {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return environment.get_template("page.html.j2").render(title=title, intro=intro, sections=sections, written=written)


def prose(text: str) -> Markup:
    """Escape a paragraph and set what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(clean(text, 10_000)))))


def cell(value: Cell) -> str:
    """Return a value as people read it: four digits of a fraction, thousands apart, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return clean(value, 2000)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?%| s| min| dB)?( ± ?[\d.,]+)?")


def is_number(value: Cell) -> bool:
    """Tell whether a cell is set flush right."""
    return (
        value is None
        or (isinstance(value, int | float) and not isinstance(value, bool))
        or bool(isinstance(value, str) and _NUMBER.fullmatch(value))
    )


def figure(shown: Figure) -> Markup:
    """Return the element of a figure's content."""
    if isinstance(shown.content, str):
        return Markup(shown.content)
    width, height = shown.content.size
    return Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(
        data_uri(shown.content), width, height, clean(shown.caption, 1000)
    )
