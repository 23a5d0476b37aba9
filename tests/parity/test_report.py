# SPDX-License-Identifier: Apache-2.0
"""Measures, cases, tolerances and the report: what they count, and that they can fail."""

from __future__ import annotations

import json
import math
import time
from xml.etree import ElementTree

import numpy as np
import pytest

from lrconvert.artifact.checks import Row
from lrconvert.engines.capability import CUSTOM_HF, NATIVE_HF, NATIVE_HF_FORMULA
from lrconvert.parity.cases import CPU, DECODED, GPU, GPU_FLOAT32, build_cases, kept, stream
from lrconvert.parity.measures import compare, merge
from lrconvert.parity.report import Report, line_of
from lrconvert.parity.tolerances import PORTABLE
from lrconvert.rope import RopeSpec, Tier, longrope_attention_factor
from lrconvert.runtimes import RUNTIMES, get_runtime
from lrconvert.runtimes.backend import Accepts


def spec(*lengths: int, start: int = 0, attention: tuple[float, ...] | None = None) -> RopeSpec:
    attention = attention or (1.0,) * len(lengths)
    tiers = tuple(Tier(n, (1.0, 1.0 + i), start, a) for i, (n, a) in enumerate(zip(lengths, attention, strict=True)))
    return RopeSpec("llama", 4, 10000.0, lengths[0], lengths[-1], tiers)


# --- measures --------------------------------------------------------------------------------------------


def test_kl_is_the_divergence_of_the_distributions() -> None:
    """Against the definition, on a case that can be done by hand; a constant added to logits is nothing."""
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]]) + 7.0
    measures = compare(p, q)
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert measures.kl_max == pytest.approx(by_hand)
    assert measures.kl_mean == pytest.approx(by_hand / 2)
    assert measures.top1 == 0.5
    assert compare(p, p + 3.0).kl_max == 0.0


def test_what_is_not_finite_can_not_pass() -> None:
    good = np.zeros((2, 3))
    for poison in (math.nan, math.inf):
        bad = good.copy()
        bad[1, 1] = poison
        assert compare(good, bad).kl_mean == math.inf


def test_rows_of_other_shape_are_an_error() -> None:
    with pytest.raises(ValueError, match="shape"):
        compare(np.zeros((2, 3)), np.zeros((2, 4)))


def test_merging_weighs_rows_by_their_positions() -> None:
    rows = [compare(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])), compare(np.zeros((3, 2)), np.zeros((3, 2)))]
    assert merge(rows, [1, 3]).kl_mean == pytest.approx(rows[0].kl_mean / 4)
    assert merge(rows, [1, 3]).kl_max == rows[0].kl_max


# --- cases -----------------------------------------------------------------------------------------------


def test_every_boundary_has_cases_on_both_sides() -> None:
    """Below, at and one past each boundary, the far end, a batch, decoding across, one past n̂."""
    cases = list(build_cases(spec(64, 128, 256, start=16), CUSTOM_HF, CPU))
    forward = {case.length for case in cases if case.kind == "forward"}
    assert forward == {17, 63, 64, 65, 127, 128, 129, 256}
    decodes = [case for case in cases if case.kind == "decode"]
    assert [(case.lengths[0], case.length) for case in decodes] == [(60, 67), (124, 131)]
    assert all(case.lengths[0] < 64 * 2**i < case.length for i, case in enumerate(decodes))
    assert {case.kind for case in cases} == {"forward", "batch", "decode"}
    assert not any(case.known or case.skipped for case in cases)


def test_native_code_is_not_blamed_for_what_it_is_known_to_do() -> None:
    """Stale keys and batch dependence are measured and shown without a bound; everything else has one."""
    cases = {case.name: case for case in build_cases(spec(64, 256), NATIVE_HF, CPU)}
    assert cases["decode across 64"].known and cases["batch across the boundary"].known
    assert not any(case.known for name, case in cases.items() if "across" not in name)
    anew = {case.name: case for case in build_cases(spec(64, 256), NATIVE_HF_FORMULA, CPU)}
    assert not anew["decode across 64"].known and anew["batch across the boundary"].known  # Phi-3 reads it again


def test_long_sequences_are_spread_and_reach_the_last_position() -> None:
    """A case beyond the budget is short, increasing, and touches both ends; long decodes say why not."""
    cases = {case.name: case for case in build_cases(spec(65536, 2**21), CUSTOM_HF, CPU)}
    far = cases["far end"]
    assert far.spread
    positions = far.positions()
    assert positions[0] == 0 and positions[-1] == 2**21 - 1
    assert (np.diff(positions) > 0).all()
    assert len(positions) <= 600
    assert "budget" in (cases["decode across 65536"].skipped or "")
    at, past = cases["at 65536"], cases["one past 65536"]
    assert (at.positions()[-1], past.positions()[-1]) == (65535, 65536)


def test_a_decode_from_a_short_prompt_is_never_too_long() -> None:
    """Code that decodes from any position is asked across every boundary, however far out."""
    accepts = Accepts("consecutive", cached_keys=True, decodes_anywhere=True)
    for budget in (CPU, GPU, GPU_FLOAT32):
        cases = build_cases(spec(65536, 2**21), CUSTOM_HF, budget, accepts=accepts)
        across = [case for case in cases if case.name.startswith("decode across 65536")]
        most = max(budget.prompt + DECODED, budget.dense)
        assert len(across) == 2 and all(case.skipped is None and case.tokens <= most for case in across)


def test_streams_are_prefixes_of_each_other_and_rows_differ() -> None:
    assert (stream(100, 50)[:20] == stream(100, 20)).all()
    assert (stream(100, 50, 1) != stream(100, 50)).any()
    assert kept(5).tolist() == [0, 1, 2, 3, 4]
    assert kept(1000)[-1] == 999 and len(np.unique(kept(1000))) == len(kept(1000))


# --- what code can express -------------------------------------------------------------------------------


def test_projection_says_all_that_is_lost_and_nothing_else() -> None:
    exact = spec(64, 128, 256, start=8, attention=(1.0, 1.1, 1.2))
    assert CUSTOM_HF.fit(exact) == (exact, [])
    native, losses = NATIVE_HF.fit(exact)
    assert [tier.max_length for tier in native.tiers] == [64, 256]
    assert [tier.attention_factor for tier in native.tiers] == [1.2, 1.2]
    assert all(tier.start_tokens == 0 for tier in native.tiers)
    assert len(losses) == 3
    plain = spec(64, 256, attention=(1.2, 1.2))
    assert NATIVE_HF.fit(plain) == (plain, [])
    formula, losses = NATIVE_HF_FORMULA.fit(plain)
    assert formula.tiers[1].attention_factor == longrope_attention_factor(4, 64)
    assert len(losses) == 1


# --- tolerances and report -------------------------------------------------------------------------------


def test_every_tolerance_has_a_reason_and_every_length_a_tolerance() -> None:
    backends = {backend.name: backend for name in RUNTIMES for backend in get_runtime(name).backends}
    for row in (*PORTABLE, *(row for backend in backends.values() for row in backend.tolerances)):
        assert len(row.reason) > 20 and 0 < row.kl_mean < row.kl_max, row
    for backend in backends.values():
        for dtype in {row.dtype for row in backend.tolerances}:
            bounds = [backend.tolerance(dtype, n).kl_mean for n in (1, 4096, 32768, 2**18, 2**19, 2**21)]
            assert bounds == sorted(bounds), (backend.name, dtype)
    with pytest.raises(KeyError, match="no tolerance for custom in int8"):
        backends["custom"].tolerance("int8", 1)


def report(*rows: Row) -> Report:
    made = Report("a", "m + r", "reference")
    made.rows += rows
    return made


PASS = Row("custom", "at 64", "pass", 64, 1e-12, 1e-11, 1e-5, 1.0, 1e-8)
FAIL = Row("custom", "one past 64", "fail", 65, 1e-2, 1.0, 3.0, 0.5, 1e-8, "mean KL 1e-02")
KNOWN = Row("native", "decode", "known", 67, 0.5, 1.0, 1.0, 0.1, reason="stale keys")


def test_a_report_passes_only_if_something_was_compared_and_nothing_failed() -> None:
    assert report(PASS, KNOWN).passed
    assert not report(PASS, FAIL).passed
    assert not report().passed
    assert not report(KNOWN, Row("files", "4 files", "pass")).passed
    assert "one past 64" in report(PASS, FAIL).summary
    assert PASS.margin == pytest.approx(1e4)


def test_a_report_renders_as_json_junit_and_table() -> None:
    made = report(PASS, FAIL, KNOWN, Row("custom", "nan", "fail", 1, math.inf, bound=1e-8, reason="x"))
    values = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert values["passed"] is False
    assert [row["verdict"] for row in values["rows"]] == ["pass", "fail", "known", "fail"]
    suite = ElementTree.fromstring(made.to_junit())
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "2", "1")
    assert [len(case) for case in suite] == [0, 1, 1, 1]
    assert [line_of(row).split()[-1] for row in made.rows] == [row.verdict for row in made.rows]
    assert len({len(line_of(row)) - len(row.verdict) for row in made.rows}) == 1  # under one header


def test_junit_cases_have_their_time() -> None:
    """From the row before to its own; the suite has the sum."""
    made = Report("a", "b", "c")
    for row, wait in ((PASS, 0.02), (KNOWN, 0.0), (FAIL, 0.05)):
        time.sleep(wait)
        made.rows += [row]
    suite = ElementTree.fromstring(made.to_junit())
    times = [float(case.get("time", "nan")) for case in suite]
    assert times[0] >= 0.02 and times[1] < 0.02 and times[2] >= 0.05
    assert float(suite.get("time", "nan")) == pytest.approx(sum(times), abs=0.002)


def test_decoding_compares_what_it_says() -> None:
    """The prompt ends before the boundary and the last compared length is past it."""
    (case,) = [c for c in build_cases(spec(64, 256), CUSTOM_HF, CPU) if c.kind == "decode"]
    assert case.lengths[0] < 64 < case.lengths[0] + DECODED - 1 == case.length
