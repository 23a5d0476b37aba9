# SPDX-License-Identifier: Apache-2.0
"""The page of a verification: one file that needs nothing else, in text and in a real browser."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import recipe_for

from lrconvert.artifact.checks import Row
from lrconvert.checkpoint import Model
from lrconvert.parity import Report
from lrconvert.parity.page import page
from lrconvert.parity.report import Rows

TRACE = tuple((position, 1e-12 * (1 + position)) for position in range(0, 128, 3))
ROWS = (
    Row("files", "9 files, sha256", "pass"),
    Row("native", "at 64", "pass", length=64, kl_mean=1e-10, kl_max=1e-9, bound=1e-6, trace=TRACE[:20]),
    Row("native", "far end", "fail", 128, kl_mean=3e-6, kl_max=1e-3, bound=1e-6, reason="a <b> & c", trace=TRACE),
    Row("native", "decode", "known", length=70, kl_mean=0.1, reason="stale keys"),
    Row("custom", "far end", "skipped", reason="not run"),
)


@pytest.fixture
def report(pico: Callable[..., Model]) -> Report:
    model = pico("llama")
    made = Report("m <1>", "demo", "float64", rows=Rows(), losses=["lost"], notes=["a note"])
    made.spec = model.resolve(recipe_for(model))
    made.rows += ROWS
    return made


class Outline(HTMLParser):
    """Tags that were opened and not closed, and what the document names outside of itself."""

    VOID = frozenset({"meta", "line", "circle", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag == "meta" else [tag]
        self.outside += [str(value) for name, value in attrs if name in ("src", "href", "action", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_page_stands_alone_and_is_well_formed(report: Report) -> None:
    """Every tag closed, nothing fetched, no script; what a stranger named is text."""
    made = page(report)
    outline = Outline()
    outline.feed(made)
    assert outline.open == [] and outline.outside == []
    assert "<script" not in made and "url(" not in made and "@import" not in made
    assert "<b> & c" not in made and "m &lt;1&gt;" in made
    text = " ".join(outline.text)
    words = ("FAILED", "boundary 64", "bound of the mean, 1e-06", "stale keys", "attention factor", "a note", "lost")
    for word in words:
        assert word in text, word


def test_every_compared_position_is_a_point(report: Report) -> None:
    """As many circles as values, in order of their position from left to right and of their KL from bottom to top."""
    circles = re.findall(r'<circle class="s1"[^>]*cx="([\d.]+)" cy="([\d.]+)"', page(report))
    assert len(circles) == len(TRACE)
    places = [(float(x), float(y)) for x, y in circles]
    assert places == sorted(places, key=lambda place: (place[0], -place[1]))


def test_odd_values_are_drawn(report: Report) -> None:
    """Zero, infinity, equal factors, no recipe."""
    assert report.spec is not None
    tiers = tuple(replace(tier, factors=(1.0,) * len(tier.factors)) for tier in report.spec.tiers)
    report.spec = replace(report.spec, tiers=tiers)
    report.rows.append(replace(ROWS[1], code="odd", trace=((0, 0.0), (5, math.inf))))
    made = page(report)
    assert "nan" not in made.partition("</style>")[2].lower().replace("nance", "")
    report.spec = None
    assert "<h2>Factors</h2>" not in page(report)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_a_browser_shows_it(report: Report, tmp_path: Path) -> None:
    """Chromium parses it into the document that was meant, and draws a picture of it."""
    (tmp_path / "verify.html").write_text(page(report), encoding="utf-8")
    assert CHROMIUM is not None
    own = f"--user-data-dir={tmp_path / 'profile'}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", own, "--window-size=900,1400"]
    address = (tmp_path / "verify.html").as_uri()
    dumped = subprocess.run([CHROMIUM, *flags, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    assert dumped.returncode == 0, dumped.stderr
    dom = dumped.stdout
    assert '<div class="verdict fail" id="verdict">' in dom
    assert dom.count("<circle") == len(TRACE) + 20 and dom.count("<polyline") == 2
    assert len(re.findall(r"<tr class=", dom)) == len(ROWS)
    picture = tmp_path / "page.png"
    subprocess.run([CHROMIUM, *flags, f"--screenshot={picture}", address], capture_output=True, timeout=120, check=True)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20_000
