# SPDX-License-Identifier: Apache-2.0
"""What is known about another program, and whether it computes a recipe.

A row says how the program chooses between the short and the long set (`Rule`), what it can express (`Capability`),
which config keys it needs, and how that is known: measured by running it, or read in its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lrconvert.engines.capability import Capability, switch_length
from lrconvert.rope import RopeSpec, Yarn, as_yarn

BRIEF = 70  # characters of a reason beside its engine
Outcome = Literal["right", "differs", "refuses", "unknown"]


@dataclass(frozen=True)
class Rule:
    """How a program chooses a factor set. Texts may name {boundary} and {window}, in tokens.

    `limits`: where it departs from the recipe by itself, so that the user must know; `breaks`: what even a
    whole prompt beyond the boundary gets instead of its set; `refuses`: what it says instead of working. All but
    `refuses` matter only where the two sets differ, unless `always`. `formula`: it makes a YaRN by itself, for every
    length, and refuses only what is none.
    """

    chooses: str
    limits: tuple[str, ...] = ()
    breaks: str | None = None
    refuses: str | None = None
    always: bool = False
    formula: bool = False


@dataclass(frozen=True)
class Need:
    """Keys of config.json, any one of which has to be there, and what happens otherwise."""

    keys: tuple[str, ...]
    otherwise: Literal["differs", "refuses"]


@dataclass(frozen=True)
class Engine:
    """One row of the table. `families` None: all of them, as far as the source shows."""

    capability: Capability
    version: str
    known: Literal["measured", "read"]
    source: str
    rule: Rule
    families: frozenset[str] | None = None
    needs: tuple[Need, ...] = ()

    @property
    def name(self) -> str:
        return self.capability.name


@dataclass(frozen=True)
class Verdict:
    """Whether an engine computes a recipe: `why` it differs or refuses, and the `limits` of its own rule."""

    engine: str
    version: str
    outcome: Outcome
    why: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(self.why)
        bounds = f"{', but ' if self.outcome == 'right' else '; also: '}{'; '.join(self.limits)}" if self.limits else ""
        return f"{self.engine} {self.version}: {self.outcome}{f': {reasons}' if reasons else ''}{bounds}"

    @property
    def brief(self) -> str:
        """The first reason, or else the first limit, in at most `BRIEF` characters."""
        first = next(iter((*self.why, *self.limits)), "")
        return first if len(first) <= BRIEF else first[: BRIEF - 1].rsplit(" ", 1)[0] + " …"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verdict(rows: Sequence[Engine], spec: RopeSpec, family: str, config: Mapping[str, Any] | None = None) -> Verdict:
    """Whether a program computes a recipe; it may have a row for each family. Without a `config` the keys that it needs
    are assumed to be there."""
    engine = next((row for row in rows if row.families is None or family in row.families), None)
    if engine is None:
        return Verdict(rows[0].name, rows[0].version, "unknown", (f"{family} was not examined there",))
    rule = engine.rule
    values = {"boundary": switch_length(spec), "window": spec.window}
    matters = rule.always or len({tier.factors for tier in (spec.tiers[0], spec.tiers[-1])}) > 1
    missing = [need for need in engine.needs if config is not None and not any(_has(config, k) for k in need.keys)]
    refusals = [_lacks(need) for need in missing if need.otherwise == "refuses"]
    refusals += [rule.refuses] if rule.refuses and not (rule.formula and _is_formula(spec)) else []
    if refusals:
        return Verdict(engine.name, engine.version, "refuses", tuple(refusals))
    why = [rule.breaks.format(**values)] if rule.breaks and matters else []
    why += [_lacks(need) for need in missing]
    if not rule.always:  # what a program can't express is no news where it expresses nothing
        why += replace(engine.capability, name="it", once=False).fit(spec)[1]
    limits = tuple(text.format(**values) for text in rule.limits) if matters else ()
    return Verdict(engine.name, engine.version, "differs" if why else "right", tuple(why), limits)


def _is_formula(spec: RopeSpec) -> bool:
    """Whether one set that is a YaRN, with the usual ramp, serves every length."""
    usual = Yarn(spec.tiers[-1].factors[-1], spec.original_window)
    return len(spec.tiers) == 1 and as_yarn(spec.tiers[0].factors, spec.base, spec.original_window) == usual


def _has(config: Mapping[str, Any], dotted: str) -> bool:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value is not None


def _lacks(need: Need) -> str:
    return f"config.json has no {' or '.join(need.keys)}"
