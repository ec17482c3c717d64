import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maekit.errors import MaekitError
from maekit.report.page import Figure, Section, Table, cell, is_number, prose, write_report
from maekit.report.plots import bars, curves

HOSTILE = (
    """"><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)> & 'x' {{ 79 * 7907 }} """
    "\x1b[31m\udc80"
)
LOADS = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background", "formaction", "ping", "cite"}


class Page(HTMLParser):
    """Every tag, every attribute that could load something, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in LOADS]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def full_page(path: Path, name: str = "clothes") -> str:
    metrics = [{"step": i, "epoch": i / 10, "loss": 1 / i, "lr": 0.001 / i} for i in range(1, 100)]
    write_report(
        path,
        title=f"Report of {name}",
        intro=[f"About {name}.", "And `code`."],
        sections=[
            Section("What was run", [f"Text {name}"], facts={"Images": name, "Count": 10_000, name: None}),
            Section(
                "Curves", figures=[Figure(curves(metrics), f"Loss of {name}"), Figure(bars({name: {name: [0.5, 0.6]}}))]
            ),
            Section("Pictures", figures=[Figure(Image.new("RGB", (1400, 40), (9, 99, 199)), f"Picture of {name}")]),
            Section(
                "Scores", tables=[Table(["arm", "top-1"], [[name, 0.81234], ["b", None]], note=name, highlight=[0])]
            ),
            Section("", commands=[f"maekit knn '{name}' \\\n  --data x"]),
        ],
    )
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["clothes", HOSTILE])
def test_the_page_asks_for_nothing_outside_itself(tmp_path: Path, name: str) -> None:
    html = full_page(tmp_path / "report.html", name)
    page = Page(html)
    assert page.addresses and all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not {"script", "iframe", "object", "embed", "base", "form", "video", "audio"} & set(page.tags)
    assert not page.handlers
    styles = "".join(re.findall(r"<style.*?</style>|style=\"[^\"]*\"", html, re.DOTALL))
    assert "@import" not in styles and all(a.startswith("#") for a in re.findall(r"url\(([^)]*)\)", styles))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html


def test_hostile_names_are_shown_as_text_and_not_evaluated(tmp_path: Path) -> None:
    html = full_page(tmp_path / "report.html", HOSTILE)
    page = Page(html)
    assert page.text.count("<script>alert(1)</script>") >= 6
    # a product that no time of day, date or plotted figure shows by chance
    assert "{{ 79 * 7907 }}" in page.text and str(79 * 7907) not in html
    assert "\x1b" not in page.text.split("maekit knn")[0]


def test_every_picture_has_words_for_those_who_do_not_see_it(tmp_path: Path) -> None:
    html = full_page(tmp_path / "report.html")
    assert 'alt="Picture of clothes"' in html and html.count('role="img" aria-label="') == 2
    assert html.index("<h1>") < html.index("<h2") and 'lang="en"' in html


def test_values_are_written_as_people_read_them() -> None:
    assert [cell(v) for v in (10_000, 0.81234, None, "a\nb", True)] == ["10,000", "0.8123", "-", "a\\nb", "True"]
    assert all(is_number(v) for v in (1, 0.5, None, "12.5 dB", "75 %", "0.664 ± 0.031", "-3"))
    assert not any(is_number(v) for v in ("from MAE", "", True, "10/class"))
    assert prose("`a<b` & c") == "<code>a&lt;b</code> &amp; c"


def test_the_page_is_whole_or_absent(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(MaekitError, match="E-ENV-OUT"):
        write_report(tmp_path / "a.txt" / "report.html", title="t", sections=[])
    full_page(tmp_path / "report.html")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "report.html"]


@pytest.fixture(scope="module")
def browser() -> Any:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    quiet = "--no-sandbox --disable-background-networking --disable-component-update --disable-sync --no-first-run"
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=quiet.split())
        yield opened
        opened.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_a_browser_makes_no_outside_request_and_has_nothing_to_complain_about(
    tmp_path: Path, browser: Any, width: int, scheme: str
) -> None:
    full_page(tmp_path / "report.html", HOSTILE)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto((tmp_path / "report.html").as_uri(), wait_until="networkidle")
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == 1
    assert complaints == []
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"
    page.close()
