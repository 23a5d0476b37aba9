# SPDX-License-Identifier: Apache-2.0
"""The result of a verification: rows, which are shown as they come, a verdict, JSON and JUnit XML."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol
from xml.etree import ElementTree

from lrconvert.artifact.checks import Row, Verdict
from lrconvert.parity.measures import Measures
from lrconvert.parity.tolerances import Tolerance
from lrconvert.rope import RopeSpec


def case_row(
    code: str, case: str, length: int, measures: Measures, tolerance: Tolerance, *, known: str | None = None
) -> Row:
    """The row of a case. `known`: what the code is known to get wrong there; no bound applies then."""
    verdict: Verdict = "pass"
    reason, bound, basis = "", tolerance.kl_mean, tolerance.reason
    if not measures.kl_mean <= tolerance.kl_mean:
        verdict, reason = "fail", f"mean KL {measures.kl_mean:.2e}, {tolerance.kl_mean:.0e} allowed"
    elif not measures.kl_max <= tolerance.kl_max:
        verdict, reason = "fail", f"largest KL {measures.kl_max:.2e}, {tolerance.kl_max:.0e} allowed"
    if known:
        verdict, reason, bound, basis = "known", known, None, ""
    return Row(code, case, verdict, length=length, bound=bound, basis=basis, reason=reason, **vars(measures))


class Aside(Protocol):
    """A check that runs beside others (`parity.integrity`)."""

    @property
    def done(self) -> bool: ...

    def rows(self) -> list[Row]: ...

    def stop(self) -> None: ...


class Rows(list[Row]):
    """Rows that are shown to `watch` when they are known. `seconds`: how long each took, from the row before it or the
    beginning. A check that finds several rows at once counts in the first of them."""

    def __init__(self, watch: Callable[[Row], None] | None = None) -> None:
        super().__init__()
        self._watch = watch
        self.seconds: list[float] = []
        self._last = time.perf_counter()
        self._aside: Aside | None = None
        self._place = 0  # of the rows that come from aside

    def append(self, row: Row) -> None:
        if self._aside is not None and self._aside.done:
            self._take()
        self._put(len(self), row)

    def _put(self, place: int, row: Row) -> None:
        super().insert(place, row)
        now = time.perf_counter()
        self.seconds.insert(place, now - self._last)
        self._last = now
        if self._watch is not None:
            self._watch(row)

    @contextlib.contextmanager
    def beside(self, check: Aside) -> Iterator[None]:
        """Its rows too: shown with the first row after they are known, or at the end, and kept here, where it began."""
        self._aside, self._place = check, len(self)
        if check.done:
            self._take()
        try:
            yield
            if self._aside is not None:
                self._take()
        finally:
            check.stop()

    def _take(self) -> None:
        aside, self._aside = self._aside, None
        for place, row in enumerate([] if aside is None else aside.rows(), self._place):
            self._put(place, row)

    def extend(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.append(row)

    def __iadd__(self, rows: Iterable[Row]) -> Rows:  # type: ignore[override]
        self.extend(rows)
        return self


@dataclass
class Report:
    """All rows, what answered (versions), what was lost, and whether the artifact is good."""

    artifact: str
    against: str
    reference: str
    rows: Rows = field(default_factory=Rows)
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files_only: bool = False  # no code was asked, so that no row has a bound
    spec: RopeSpec | None = None  # what the artifact has to compute; for people who look at it

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == "fail"]

    @property
    def passed(self) -> bool:
        """Something was compared, and nothing failed."""
        compared = (row.verdict == "pass" and (row.bound is not None or self.files_only) for row in self.rows)
        return not self.failed and any(compared)

    @property
    def summary(self) -> str:
        compared = [row for row in self.rows if row.bound is not None and row.verdict in ("pass", "fail")]
        if not self.passed:
            worst = self.failed[0] if self.failed else None
            where = f": {worst.code} code, {worst.case}: {worst.reason}" if worst else ": nothing was compared"
            return f"FAILED, {len(self.failed)} of {len(self.rows)} checks{where}"
        if self.files_only:
            passed = sum(row.verdict == "pass" for row in self.rows)
            return f"verified, files only: {passed} checks passed; no code ran"
        closest = min(compared, key=lambda row: row.margin or 0)
        return (
            f"verified: {len(compared)} cases agree with the reference; closest to its bound: {closest.code} "
            f"code, {closest.case}, KL {closest.kl_mean:.1e} of {closest.bound:.0e} allowed"
        )

    def to_json(self) -> dict[str, Any]:
        rows = [{key: _finite(value) for key, value in row.values.items()} for row in self.rows]
        return {
            "passed": self.passed,
            "summary": self.summary,
            **{key: value for key, value in vars(self).items() if key not in ("rows", "files_only", "spec")},
            **({"files_only": True} if self.files_only else {}),
            "rows": rows,
        }

    def to_markdown(self) -> str:
        """A summary for people: the verdict, and every row, those that failed first."""
        mark = "✅" if self.passed else "❌"
        lines = [f"## {mark} {_cell(self.artifact)}", "", _cell(self.summary), ""]
        lines += [f"Against {_cell(self.against)}.", ""]
        counts = Counter(row.verdict for row in self.rows)
        lines += [", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count), ""]
        lines += ["| | code | case | tokens | KL mean | bound | why |", "|---|---|---|--:|--:|--:|---|"]
        order = ("fail", "skipped", "known", "pass")
        for row in sorted(self.rows, key=lambda row: order.index(row.verdict)):
            numbers = ("" if row.length is None else row.length, _scientific(row.kl_mean), _scientific(row.bound))
            cells = [row.verdict, _cell(row.code), _cell(row.case), *map(str, numbers), _cell(row.reason)]
            lines.append(f"| {' | '.join(cells)} |")
        versions = [f"{name}: {_told(info)}" for name, info in self.runtimes.items()]
        told = [*versions, *(f"lost: {loss}" for loss in self.losses), *self.notes]
        return "\n".join([*lines, "", *(f"- {_cell(line)}" for line in told)]) + "\n"

    def to_junit(self) -> str:
        """JUnit XML, one test case a row, for CI systems."""
        suite = ElementTree.Element(
            "testsuite",
            name="lrconvert verify",
            tests=str(len(self.rows)),
            failures=str(len(self.failed)),
            skipped=str(sum(row.verdict in ("skipped", "known") for row in self.rows)),
            time=f"{sum(self.rows.seconds):.3f}",
        )
        for row, seconds in zip(self.rows, self.rows.seconds, strict=True):
            values = {"classname": f"lrconvert.{row.code}", "name": row.case, "time": f"{seconds:.3f}"}
            case = ElementTree.SubElement(suite, "testcase", values)
            if row.verdict == "fail":
                ElementTree.SubElement(case, "failure", message=row.reason).text = str(row.values)
            elif row.verdict != "pass":
                ElementTree.SubElement(case, "skipped", message=row.reason)
        ElementTree.indent(suite)
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


_COLUMNS = "{:<12} {:<50} {:>9} {:>8} {:>8} {:>6} {:>7}  {:<7}  {}"
HEADER = _COLUMNS.format("code", "case", "tokens", "KL mean", "KL max", "bound", "margin", "verdict", "bound from")


def line_of(row: Row) -> str:
    """A row as a line of text, under `HEADER`."""
    margin = row.margin
    return _COLUMNS.format(
        row.code,
        row.case,
        "" if row.length is None else row.length,
        *("" if value is None else f"{value:.1e}" for value in (row.kl_mean, row.kl_max)),
        "" if row.bound is None else f"{row.bound:.0e}",
        ""
        if margin is None
        else "∞"
        if math.isinf(margin)
        else f"{margin:.0f}x"
        if margin >= 100
        else f"{margin:.3g}x",
        row.verdict,
        "" if row.bound is None or not row.basis else "the table" if row.noise is None else f"noise {row.noise:.1e}",
    ).rstrip()


def _told(info: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in info.items())


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _cell(text: str) -> str:
    """Text that stays in its cell: Markdown's and HTML's own characters mean nothing."""
    plain = " ".join(text.split())
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", plain)


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
