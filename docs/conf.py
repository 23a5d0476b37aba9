# SPDX-License-Identifier: Apache-2.0
"""The documentation as a site: Sphinx over the repository's Markdown, strict about links.

    tools/docs          builds build/site and fails at the first link or anchor that leads nowhere

The source folder is the repository, so that a link means the same here and on a forge. A file that is no page (a
recipe, a benchmark's JSON) becomes a download.
"""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

from lrconvert import __version__

project = "lrconvert"
release = version = __version__
copyright = "the lrconvert authors, Apache-2.0"

extensions = ["myst_parser"]
myst_heading_anchors = 4
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "recipes/*/README.md", "benchmarks/**.md", "examples/*/README.md",
                    "lrconvert/data/demo/README.md"]  # fmt: skip
exclude_patterns = ["build", ".venv", "lrconvert-demo"]
# Pages of benchmarks are reached through the pages that quote them, and some begin with a smaller heading.
suppress_warnings = ["toc.not_included", "myst.header"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_title = f"lrconvert {__version__}"
html_copy_source = False
html_show_sphinx = False

# The site's order. On a forge the README's last section is the table of contents.
NAVIGATION = {
    "Formats": ("docs/hf", "docs/gguf", "docs/llama-cpp", "docs/onnx", "docs/quantised-sources",
                "examples/web/README", "docs/engines", "docs/families"),
    "Recipes": ("docs/recipe-format", "docs/scaled-models", "docs/search", "docs/extend", "recipes/demo-2048k/README",
                "recipes/demo-2048k-any/README",
                "recipes/demo-8x/README", "recipes/demo-8x-any/README", "recipes/demo-yarn-8x/README",
                "recipes/demo-yarn-8x-any/README", "recipes/smollm2-135m-2048k/README",
                "recipes/smollm2-135m-2048k-any/README", "recipes/smollm2-135m-64k/README",
                "recipes/smollm2-135m-64k-any/README", "recipes/llama2-7b-2048k/README",
                "recipes/llama2-7b-2048k-ft128k/README", "recipes/mistral-7b-2048k/README",
                "recipes/mistral-7b-2048k-ft128k/README"),
    "Using it": ("docs/verify", "docs/evaluations", "docs/publishing", "docs/ci", "docs/python", "docs/exit-codes"),
    "Working on it": ("CONTRIBUTING", "docs/ARCHITECTURE", "docs/performance", "benchmarks/README", "SECURITY",
                      "CHANGELOG"),
}  # fmt: skip


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Sphinx wants its tables of contents in a page; a forge would show them as code."""
    if name == root_doc:
        for caption, pages in NAVIGATION.items():
            listed = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def add_start_page(app: Sphinx, error: Exception | None) -> None:
    """A web server opens index.html."""
    if error is None:
        start = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=README.html">\n'
        (Path(app.outdir) / "index.html").write_text(start, encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_start_page)
