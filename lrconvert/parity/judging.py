# SPDX-License-Identifier: Apache-2.0
"""Is an answer as close to the reference as a right program can be?

A program's row of tolerances says how far any of its answers may be off. Angles in float32 add noise that no row can
foresee: it grows with the position, the size of a head and how sharply a model attends. So an answer beyond its row
gets a second opinion: the reference computes the case once more in float32, with angles (and, for a float16 cache,
attention; for products of integers, activations) rounded as the program rounds them. How far that is from the exact
answer is the noise of this case on this model, and `tolerances.NOISE` times that is allowed on top. Answers within
their row cost nothing more.

Now and then a token's answer hangs on a near tie deep in the model, and rounding in a narrow type tips it over. Beyond
their row in such types, the largest KL is therefore that of all but `tolerances.TIPPED` of the tokens; the mean has
them all, and a wrong rotation moves them all.

A router's choice of experts jumps where two scores are equal. Rounding decides near ties, so in types narrower than
float32 some tokens are answered by other experts than the reference's. Beyond their row, models with experts are judged
by the tokens that agree best (`tolerances.ROUTED`): a wrong rotation moves those too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrconvert.artifact.checks import Row
from lrconvert.parity.measures import Measures, compare, merge
from lrconvert.parity.opened import Opened
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.parity.report import case_row
from lrconvert.parity.tolerances import NOISE, NOISE_OF_8_BITS, ROUTED, TIPPED
from lrconvert.runtimes.backend import Rounding
from lrconvert.runtimes.tolerances import Tolerance

Logits = Sequence[np.ndarray]
CLOSEST = f"of the {ROUTED:.0%} of the tokens that agree best: rounding decides near ties of a router"
FEW = "too few tokens to tell a mistake from near ties of a router, which rounding decides"
SPARED = f"the largest KL of all but {TIPPED:.0%} of the tokens: rounding tips one over now and then"
ENOUGH = 32  # tokens


@dataclass(frozen=True)
class Asked:
    """What an artifact answered, [n, vocabulary] for each row, and how a reference answers the same."""

    answers: Logits
    expect: Callable[[ReferenceRunner], Logits]


def judged(
    code: str, case: str, length: int, asked: Asked, opened: Opened, tolerance: Tolerance, *, known: str | None = None
) -> Row:
    """The row of a case. `known`: what the code is known to get wrong there; no bound applies then."""
    expected = asked.expect(opened.reference)
    measures = over_rows(expected, asked.answers)
    closest = known is None and opened.routed and not tolerance.holds(measures.kl_mean, measures.kl_max)
    if closest and sum(map(len, expected)) < ENOUGH:
        closest, known = False, FEW
    elif closest:
        measures = over_rows(expected, asked.answers, ROUTED)
    noise, spared = None, 0.0
    if known is None and not tolerance.holds(measures.kl_mean, measures.kl_max):
        rounded = asked.expect(opened.reference.rounded(opened.rounding))
        share, spared = ROUTED if closest else 1.0, TIPPED if opened.rounding.narrow else 0.0
        measures = over_rows(expected, asked.answers, share, spared)
        noise = over_rows(expected, rounded, share, spared)
        tolerance = with_noise(tolerance, noise, opened.rounding)
    row = case_row(code, case, length, measures, tolerance, known=known)
    notes = [CLOSEST] * closest + [SPARED] * bool(spared)
    row = replace(row, basis="; ".join([row.basis, *notes])) if notes else row
    return row if noise is None else replace(row, noise=noise.kl_mean)


def over_rows(expected: Logits, answers: Logits, share: float = 1.0, spared: float = 0.0) -> Measures:
    """One measure for every row that was compared; `share` and `spared`: see `compare`."""
    parts = [compare(ours, theirs, share, spared) for ours, theirs in zip(expected, answers, strict=True)]
    return merge(parts, [len(ours) for ours in expected])


def with_noise(tolerance: Tolerance, noise: Measures, rounding: Rounding) -> Tolerance:
    """A row of tolerances with the noise of one case on top. Noise that is no finite number allows nothing."""
    if not np.isfinite([noise.kl_mean, noise.kl_max]).all():
        return tolerance
    times = NOISE_OF_8_BITS if rounding.activations else NOISE
    what = f"{times:.0f} x the {noise.kl_mean:.1e} that {rounding} cost the reference here"
    return replace(
        tolerance,
        kl_mean=tolerance.kl_mean + times * noise.kl_mean,
        kl_max=tolerance.kl_max + NOISE * noise.kl_max,
        reason=f"{tolerance.kl_mean:.0e} and {what}",
    )


def rounding_notes(rows: Iterable[Row], opened: Opened) -> list[str]:
    """What a user has to know of bounds that follow the rounding of activations."""
    beyond, block = [row for row in rows if row.noise is not None], opened.rounding.activations
    if not beyond or not block:
        return []
    cases = f"{len(beyond)} case{'s' if len(beyond) > 1 else ''}"
    return [
        f"{opened.name} rounds activations to 8 bits, {block} with one scale. In {cases} that moves the "
        "answers by more than the table allows any model; there the reference rounded in the same way, and "
        f'{NOISE_OF_8_BITS:.0f} times what it lost by that is allowed on top ("bound from": noise)'
    ]
