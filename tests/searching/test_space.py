# SPDX-License-Identifier: Apache-2.0
"""Whatever is put in, a candidate keeps the constraints of its space."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.search_helpers import small_space

from lrconvert.errors import UsageError
from lrconvert.rope import Tier, longrope_attention_factor
from lrconvert.searching.evolution import cross, mutate
from lrconvert.searching.guided import breed, ramps
from lrconvert.searching.space import Candidate, Kind, Space, space_for


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Spaces of both kinds, of usual and odd shapes, for extensions and for short sets."""
    dim = 2 * draw(st.sampled_from([2, 3, 8, 32, 64]))
    window = draw(st.sampled_from([64, 100, 4096]))
    ratio = draw(st.sampled_from([1.0, 1.01, 1.5, 2.0, 8.0, 512.0]))
    kind: Kind = draw(st.sampled_from(["longrope", "longrope2"]))
    return space_for(dim, draw(st.sampled_from([100.0, 10000.0, 5e6])), window, int(window * ratio), kind=kind)


@given(spaces(), st.data())
def test_make_projects_into_the_space(space: Space, data: st.DataObject) -> None:
    numbers = st.floats(-10, 1e9, allow_nan=False)
    factors = data.draw(st.lists(numbers, min_size=space.size, max_size=space.size))
    start = data.draw(st.integers(-5, 10**6))
    attention = data.draw(st.none() | st.floats(0.01, 100))
    critical = data.draw(st.none() | st.integers(-5, 200))
    candidate = space.make(factors, start, attention, critical)
    assert space.problems(candidate) == []
    assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate


@given(spaces(), st.integers(0, 2**32 - 1))
def test_offspring_stay_in_the_space(space: Space, seed: int) -> None:
    """Seeds, ramps, mutants, children and bred ones, over some generations."""
    rng = np.random.default_rng(seed)
    pool = [candidate for _, candidate in space.seeds()] + ramps(space, 4, rng)
    for _ in range(6):
        one, other = pool[rng.integers(len(pool))], pool[rng.integers(len(pool))]
        pool += [mutate(space, one, rng, 0.5), cross(space, one, other, rng), breed(space, pool, rng, 0.5)]
    assert [problem for candidate in pool for problem in space.problems(candidate)] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": (100, 120, 110, 130, 140, 150, 160, 170)}, "not monotone"),
        ({"steps": (99, 120, 130, 140, 150, 160, 170, 180)}, "below 1"),
        ({"steps": (100, 120, 130, 140, 150, 160, 170, 1001)}, "needed 1.0 … 10.0"),
        ({"steps": (100,) * 7}, "7 factors; needed 8"),
        ({"start_tokens": 3}, "start tokens 3"),
        ({"attention_factor": 1.5}, "attention factor 1.5"),
        ({"critical": 4}, "critical index 4 in the space longrope"),
    ],
)
def test_the_check_can_fail(change: dict[str, object], expected: str) -> None:
    """`problems` finds what `make` never makes."""
    space = small_space()
    broken = replace(space.make(np.linspace(1, 8, 8)), **change)
    assert expected in "; ".join(space.problems(broken))


def test_longrope2_is_ntk_like_below_its_critical_index() -> None:
    space = space_for(64, 10000.0, 4096, 32768, kind="longrope2")
    assert space.theoretical_critical == 23  # ceil(32 · log(4096 / 2π) / log 10000) = ceil(22.51)
    candidate = space.make(np.full(32, 10.0), critical=20)
    assert candidate.critical == 20
    np.testing.assert_allclose(candidate.factors[:20], 10 ** (np.arange(20) / 20), atol=0.005)
    assert min(candidate.factors[20:]) >= 8.0
    bent = replace(candidate, steps=(100, 100, *candidate.steps[2:]))
    assert "not NTK-like below the critical index 20" in space.problems(bent)
    with pytest.raises(UsageError, match="LongRoPE2"):
        Space(64, 10000.0, 4096, 4096, (1.0, 1.0), "longrope2")


def test_seeds_are_the_known_sets() -> None:
    """PI, NTK-aware, YaRN and NTK(2s), the last clipped to 1.25 s; the unmodified model for a short set."""
    seeds = dict(space_for(64, 100000.0, 8192, 65536).seeds())
    assert list(seeds) == ["pi", "ntk", "yarn", "ntk2"]
    assert set(seeds["pi"].steps) == {800}
    assert seeds["ntk"].factors[-1] == 8.0
    assert seeds["ntk2"].factors[-1] == 10.0
    assert seeds["yarn"].factors[10:12] == (1.0, 1.1)  # as in the recorded journal
    short = space_for(64, 100000.0, 8192, 8192)
    assert [(name, set(candidate.steps)) for name, candidate in short.seeds()] == [("unmodified", {100})]
    assert short.seeds()[0][1].attention_factor == 1.0


def test_attention_factor_is_the_formula_s_or_searched() -> None:
    """Beyond the window LongRoPE's formula, exactly; within it free on a grid."""
    space = space_for(64, 100000.0, 8192, 65536)
    formula = longrope_attention_factor(8.0, 8192)
    assert space.make(np.ones(32), attention=2.0).attention_factor == formula
    short = space_for(64, 100000.0, 8192, 8192)
    assert short.make(np.ones(32), attention=1.09876).attention_factor == 1.099
    assert short.make(np.ones(32), attention=9.0).attention_factor == 1.25


def test_tiers_have_the_factors_of_the_grid() -> None:
    candidate = small_space().make(np.linspace(1, 8, 8), 4)
    assert candidate.tier(512) == Tier(512, candidate.factors, 4, candidate.attention_factor)
    assert all(round(factor, 2) == factor for factor in candidate.factors)
