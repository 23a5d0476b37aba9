# SPDX-License-Identifier: Apache-2.0
"""A verification as one page: the verdict, KL along the positions of each code, the factors, every row.

    Path("verify.html").write_text(page(report))

No script, no font, no picture of another place: it opens from a mail, a CI artifact or a disk. The drawings are SVG,
with a text for each point. Colours follow the reader's light or dark setting, and marks say the same as they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from lrconvert.artifact.checks import Row
from lrconvert.parity.report import Report
from lrconvert.rope import RopeSpec

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 240, 62, 34, 12, 16
LEAST = 1e-16  # KL below this is drawn there: nothing
MARKS = {"pass": "✓", "fail": "✗", "known": "≈", "skipped": "–"}
SERIES = 6  # colours in the style sheet

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--back:#fff;--panel:#f6f8fa;--good:#1a7f37;
--bad:#cf222e;--s0:#0969da;--s1:#bc4c00;--s2:#8250df;--s3:#1a7f37;--s4:#bf3989;--s5:#57606a}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--back:#0d1117;--panel:#151b23;
--good:#3fb950;--bad:#f85149;--s0:#4493f8;--s1:#f0883e;--s2:#ab7df8;--s3:#3fb950;--s4:#db61a2;--s5:#9198a1}}
*{box-sizing:border-box}body{margin:0 auto;max-width:64rem;padding:1.5rem 1rem 4rem;background:var(--back);
color:var(--ink);font:15px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.2rem 0 .5rem}p{margin:.4rem 0}.soft{color:var(--soft)}
.verdict{border:1px solid var(--line);border-left:.5rem solid;border-radius:.4rem;padding:.7rem 1rem;margin:1rem 0;
background:var(--panel);overflow-wrap:anywhere}.verdict b{font-size:1.15rem}
.pass{color:var(--good)}.fail{color:var(--bad)}
.verdict.pass{border-left-color:var(--good)}.verdict.fail{border-left-color:var(--bad)}.verdict p{color:var(--ink)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.87rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}td.n{text-align:right;font-variant-numeric:tabular-nums;
white-space:nowrap}td.reason{max-width:26rem;overflow-wrap:anywhere}
tr.fail td{background:color-mix(in srgb,var(--bad) 9%,transparent)}
svg{width:100%;min-width:34rem;height:auto;display:block}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.grid{stroke:var(--line)}.edge{stroke:var(--ink);stroke-dasharray:4 3}.bound{stroke:var(--bad);stroke-width:1.5}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;font-size:.85rem;margin:.3rem 0}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin-right:.35rem;vertical-align:-.08rem}
""" + "".join(
    f".s{i}{{fill:var(--s{i});stroke:var(--s{i});background:var(--s{i})}}.l{i}{{fill:none;stroke:var(--s{i});stroke-width:2}}"
    for i in range(SERIES)
)


def page(report: Report) -> str:
    """The report as HTML."""
    verdict = "pass" if report.passed else "fail"
    title = f"{report.artifact}: {'verified' if report.passed else 'FAILED'}"
    parts = [
        f"<h1>{escape(report.artifact)}</h1>",
        f'<p class="soft">against {escape(report.against)} ({escape(report.reference)})</p>',
        f'<div class="verdict {verdict}" id="verdict"><b class="{verdict}">{MARKS[verdict]} '
        f"{'verified' if report.passed else 'FAILED'}</b><p>{escape(report.summary)}</p></div>",
        *_runtimes(report),
        *_along_positions(report),
        *_factors(report.spec),
        *_table(report.rows),
        *_words("What was lost", report.losses),
        *_words("Notes", report.notes),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _runtimes(report: Report) -> Iterator[str]:
    for name, info in report.runtimes.items():
        told = ", ".join(f"{key} {value}" for key, value in info.items())
        yield f'<p class="soft"><b>{escape(name)}</b>: {escape(told)}</p>'


def _words(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        yield f"<h2>{title}</h2><ul>{items}</ul>"


# --- rows ------------------------------------------------------------------------------------------------


def _table(rows: Iterable[Row]) -> Iterator[str]:
    head = "".join(f"<th>{name}</th>" for name in ("", "code", "case", "tokens", "KL mean", "KL max", "bound", "why"))
    lines = []
    for row in rows:
        numbers = ("" if row.length is None else f"{row.length:,}", _short(row.kl_mean), _short(row.kl_max),
                   _short(row.bound))  # fmt: skip
        cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
        mark = f'<td class="{row.verdict}" title="{row.verdict}">{MARKS[row.verdict]}</td>'
        reason = escape(row.reason or row.basis)
        lines.append(
            f'<tr class="{row.verdict}">{mark}<td>{escape(row.code)}</td><td>{escape(row.case)}</td>{cells}'
            f'<td class="reason">{reason}</td></tr>'
        )
    legend = "✓ within its bound, ✗ failed, ≈ known and measured, – not run"
    yield f'<h2>Every check</h2><p class="soft">{legend}</p><div class="wide"><table id="rows"><thead><tr>{head}</tr>'
    yield f"</thead><tbody>{''.join(lines)}</tbody></table></div>"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


# --- drawings --------------------------------------------------------------------------------------------


def _along_positions(report: Report) -> Iterator[str]:
    """A drawing for each code: every compared position of its forward cases, boundaries and the bound marked."""
    traced = [row for row in report.rows if row.trace]
    edges = () if report.spec is None else tuple(report.spec.boundaries)
    for code in dict.fromkeys(row.code for row in traced):
        rows = [row for row in traced if row.code == code]
        yield f"<h2>KL along the positions: {escape(code)}</h2>"
        yield f'<div class="legend">{"".join(_legend(index, row.case) for index, row in enumerate(rows))}</div>'
        yield f'<div class="wide">{_scatter(code, rows, edges)}</div>'


def _legend(index: int, text: str) -> str:
    return f'<span><i class="s{index % SERIES}"></i>{escape(text)}</span>'


def _scatter(code: str, rows: Sequence[Row], edges: Sequence[int]) -> str:
    far = max(position for row in rows for position, _ in row.trace) + 1
    values = [max(value, LEAST) for row in rows for _, value in row.trace if math.isfinite(value)]
    bounds = sorted({row.bound for row in rows if row.bound})
    low, high = _decades([*values, *bounds])
    x, y = _Log(1, max(far, 2), LEFT, WIDTH - RIGHT), _Log(low, high, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(x, y, "position", "KL in nats")]
    for edge in edges:
        if edge <= far:
            at = x(edge)
            parts.append(f'<line class="edge" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{at - 4:.1f}" y="{TOP + 10}" text-anchor="end">boundary {edge:,}</text>')
    for bound in bounds:
        at = y(bound)
        parts.append(f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT + 4}" y="{at + 13:.1f}">bound of the mean, {bound:.0e}</text>')
    for index, row in enumerate(rows):
        for position, value in row.trace:
            finite = value if math.isfinite(value) else high
            parts.append(
                f'<circle class="s{index % SERIES}" r="2.4" cx="{x(position + 1):.1f}" '
                f'cy="{y(max(finite, LEAST)):.1f}"><title>{escape(row.case)}, position {position:,}: KL {value:.1e}'
                "</title></circle>"
            )
    return _svg(f"KL of {code} at each compared position, logarithmic", parts)


def _factors(spec: RopeSpec | None) -> Iterator[str]:
    """The factors of each set by frequency index."""
    if spec is None:
        return
    tiers = spec.tiers
    names = [
        f"up to {tier.max_length:,} tokens: attention factor {tier.attention_factor:.4g}"
        + (f", {tier.start_tokens} start tokens" if tier.start_tokens else "")
        for tier in tiers
    ]
    values = [factor for tier in tiers for factor in tier.factors]
    low, high = min(values), max(values)
    high = high if high > low * 1.05 else low * 1.05
    count = len(tiers[0].factors)
    x, y = _Line(0, max(count - 1, 1), LEFT, WIDTH - RIGHT), _Log(low / 1.05, high * 1.05, HEIGHT - BOTTOM, TOP)
    parts = [*_axes(x, y, "frequency index", "factor")]
    for index, tier in enumerate(tiers):
        points = " ".join(f"{x(i):.1f},{y(factor):.1f}" for i, factor in enumerate(tier.factors))
        line = f'<polyline class="l{index % SERIES}" points="{points}">'
        parts.append(f"{line}<title>{escape(names[index])}</title></polyline>")
    yield "<h2>Factors</h2>"
    yield f'<div class="legend">{"".join(_legend(index, name) for index, name in enumerate(names))}</div>'
    yield f'<div class="wide">{_svg("Factors of each set by frequency index", parts)}</div>'


def _svg(title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


class _Line:
    """A linear scale from values to places in a drawing."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.high, self.start, self.stop = low, high, start, stop

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        step = max(1, round((self.high - self.low) / 8))
        return list(range(int(self.low), int(self.high) + 1, step))


class _Log(_Line):
    """The same of logarithms."""

    def __call__(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.stop - self.start)

    def ticks(self) -> list[float]:
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        decades = [10.0**power for power in range(first, last + 1)]
        if len(decades) > 1:
            return decades[:: max(1, len(decades) // 7)]
        return [self.low * (self.high / self.low) ** (index / 4) for index in range(5)]


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Whole decades around values, two at least."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**first, 10.0 ** max(last, first + 2)


def _axes(x: _Line, y: _Line, below: str, beside: str) -> Iterator[str]:
    for value in y.ticks():
        at = y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    for value in x.ticks():
        at = x(value)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        yield f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:,.0f}</text>'
    yield f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{below}</text>'
    middle = (HEIGHT - BOTTOM) / 2
    yield f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{beside}</text>'
