# SPDX-License-Identifier: Apache-2.0
"""What is known about another program, and whether it computes a recipe.

A row says how the program chooses between the short and the long set (`Rule`), what it can express (`Capability`),
which config keys it needs, and how that is known: tested, measured by running it once, or read in its source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lrconvert.engines.capability import SAME, Capability, formula_attention_factor, of_model, switch_length
from lrconvert.families import ModelShape
from lrconvert.rope import RopeSpec, Yarn, as_yarn

BRIEF = 70  # characters of a reason beside its engine
Outcome = Literal["right", "differs", "refuses", "unknown"]


@dataclass(frozen=True)
class Rule:
    """How a program chooses a factor set. Texts may name {boundary} and {window}, in tokens.

    `limits`: where it departs from the recipe by itself, so that the user must know; `breaks`: what even a
    whole prompt beyond the boundary gets instead of its set; `refuses`: what it says instead of working. All but
    `refuses` matter only where the two sets differ, unless `always`. `formula`: it makes a YaRN by itself, for every
    length, and refuses only what is none. `section`: what it refuses is this one of config.json; None: any.
    """

    chooses: str
    limits: tuple[str, ...] = ()
    breaks: str | None = None
    refuses: str | None = None
    always: bool = False
    formula: bool = False
    section: str | None = None


Config = Mapping[str, Any]


@dataclass(frozen=True)
class Need:
    """What config.json has to be like, and what happens otherwise.

    `words`: as the page says it; `lacking`: of a config that isn't so; `met`: whether one is. `of_attention`: it
    matters only where the attention factor isn't that of LongRoPE's formula, and `lrconvert hf` writes no such key.
    """

    words: str
    lacking: str
    met: Callable[[Config], bool]
    otherwise: Literal["differs", "refuses"]
    of_attention: bool = False

    def matters(self, config: Config | None, spec: RopeSpec) -> bool:
        """Whether a recipe asks for it. Without a `config` the keys are those that `lrconvert hf` writes."""
        if not self.of_attention:
            return config is not None
        formula = formula_attention_factor(spec)
        return any(abs(tier.attention_factor - formula) > SAME * formula for tier in spec.tiers)


def has(*keys: str, otherwise: Literal["differs", "refuses"] = "differs") -> Need:
    """Any one of these keys, dotted."""
    return Need(
        " or ".join(f"`{key}`" for key in keys),
        f"config.json has no {' or '.join(keys)}",
        lambda config: any(_value(config, key) is not None for key in keys),
        otherwise,
    )


def named(*types: str) -> Need:
    """A type of scaling that the program knows, whichever key names it."""
    known = ", ".join(f"`{name}`" for name in types)
    return Need(
        f"a type among {known}" if len(types) > 1 else f"the type {known}",
        f"config.json names a type that it does not know; it knows {', '.join(types)}",
        lambda config: _type(config) in (None, *types),
        "refuses",
    )


def exactly(section: str, *keys: str) -> Need:
    """No other keys in a section than these, and all of them."""
    return Need(
        f"nothing in `{section}` but {', '.join(f'`{key}`' for key in keys)}",
        f"{section} of config.json has other keys than {', '.join(keys)}",
        lambda config: set(config.get(section) or keys) == set(keys),
        "refuses",
    )


def attention_factor(*keys: str) -> Need:
    """The key that states an attention factor; without it the program computes the formula's."""
    need = has(*keys)
    return replace(need, lacking=f"{need.lacking}: it computes its attention factor", of_attention=True)


def where(kind: str, need: Need) -> Need:
    """A need of configs that name this type."""
    return replace(
        need, words=f"{need.words} beside `{kind}`", met=lambda config: _type(config) != kind or need.met(config)
    )


def within(section: str, need: Need) -> Need:
    """A need of configs that have this section at all."""
    return replace(need, met=lambda config: not config.get(section) or need.met(config))


@dataclass(frozen=True)
class Engine:
    """One row of the table. `known`: "tested" where the tests ask the program itself, every time; otherwise when it was
    measured, or its source read. `families` None: all of them, as far as the source shows."""

    capability: Capability
    version: str
    known: str
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


def verdict(
    rows: Sequence[Engine],
    spec: RopeSpec,
    family: str,
    config: Mapping[str, Any] | None = None,
    shape: ModelShape | None = None,
) -> Verdict:
    """Whether a program computes a recipe; it may have a row for each family. Without a `config` the keys that it needs
    are assumed to be there, without a `shape` a model that adds nothing to the recipe."""
    engine = next((row for row in rows if row.families is None or family in row.families), None)
    if engine is None:
        return Verdict(rows[0].name, rows[0].version, "unknown", (f"{family} was not examined there",))
    rule = engine.rule
    values = {"boundary": switch_length(spec), "window": spec.window}
    matters = rule.always or len({tier.factors for tier in (spec.tiers[0], spec.tiers[-1])}) > 1
    missing = [need for need in engine.needs if need.matters(config, spec) and not need.met(config or {})]
    refusals = [need.lacking for need in missing if need.otherwise == "refuses"]
    spared = (rule.formula and _is_formula(spec)) or (config and rule.section and not config.get(rule.section))
    refusals += [rule.refuses] if rule.refuses and not spared else []
    if refusals:
        return Verdict(engine.name, engine.version, "refuses", tuple(refusals))
    why = [rule.breaks.format(**values)] if rule.breaks and matters else []
    why += [need.lacking for need in missing]
    if not rule.always:  # what a program can't express is no news where it expresses nothing
        why += replace(of_model(engine.capability, shape), name="it", once=False).fit(spec)[1]
    limits = tuple(text.format(**values) for text in rule.limits) if matters else ()
    return Verdict(engine.name, engine.version, "differs" if why else "right", tuple(why), limits)


def _is_formula(spec: RopeSpec) -> bool:
    """Whether one set that is a YaRN, with the usual ramp, serves every length."""
    usual = Yarn(spec.tiers[-1].factors[-1], spec.original_window)
    return len(spec.tiers) == 1 and as_yarn(spec.tiers[0].factors, spec.base, spec.original_window) == usual


def _value(config: Config, dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _type(config: Config) -> Any:
    sections = ("rope_scaling", "rope_parameters")
    named = (_value(config, f"{section}.{key}") for section in sections for key in ("rope_type", "type"))
    return next((name for name in named if name is not None), None)
