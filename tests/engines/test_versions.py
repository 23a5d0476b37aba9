# SPDX-License-Identifier: Apache-2.0
"""What the table says of transformers, asked of the versions themselves: each spelling of a config is loaded there, and
what comes out is compared with the float64 reference.

`LRCONVERT_OLDEST_PYTHON` names the interpreter of 4.57; the other version is the one that is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pico import FAMILIES, WINDOW, query_scale

from lrconvert.checkpoint import Model, open_model
from lrconvert.engines.engine import Engine
from lrconvert.engines.engine import verdict as verdict_on
from lrconvert.engines.table import ENGINES
from lrconvert.errors import InputError
from lrconvert.families import get_family
from lrconvert.parity.cases import stream
from lrconvert.parity.measures import compare
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.rope import RopeSpec, Tier, longrope_attention_factor
from lrconvert.runtimes import transformers
from lrconvert.runtimes.base import Interpreter

OLDEST = os.environ.get("LRCONVERT_OLDEST_PYTHON")
VERSIONS = {
    "transformers 4.57, native": pytest.param(
        "transformers 4.57, native",
        marks=pytest.mark.skipif(not OLDEST, reason="LRCONVERT_OLDEST_PYTHON names no interpreter"),
    ),
    "transformers 5, native": "transformers 5, native",
}
# Nats: rounding in float32 makes 5e-12 here, the nearest other rotation more than 2e-3 (one layer of OLMo 3 is scaled).
SAME, OTHER = 1e-8, 1e-3
LONGEST = 2 * WINDOW
FORMULA = longrope_attention_factor(2.0, WINDOW)

Config = dict[str, Any]


@pytest.fixture(scope="module", params=VERSIONS.values())
def version(request: pytest.FixtureRequest) -> Iterator[tuple[str, str | None, Interpreter]]:
    """An engine of the table, its interpreter, and a process of it: importing takes longer than what it is asked."""
    python = OLDEST if "4.57" in request.param else None
    started = Interpreter(transformers.WORKER, python=python)
    yield request.param, python, started
    started.close()


def spec_of(model: Model, attention: float = FORMULA) -> RopeSpec:
    shape = model.shape
    pairs = shape.rotary_dim // 2
    sets = ((1.0,) * pairs, tuple(1.0 + 0.5 * index for index in range(pairs)))
    tiers = tuple(Tier(end, factors, 0, attention) for end, factors in zip((WINDOW, LONGEST), sets, strict=True))
    return RopeSpec(model.family.name, shape.rotary_dim, shape.theta, WINDOW, LONGEST, tiers)


def spellings(spec: RopeSpec, plain: Config) -> dict[str, Config]:
    """The rotation in the ways that configs were found to say it: as trainers, hand edits and either version do."""
    lists = {"short_factor": [*spec.tiers[0].factors], "long_factor": [*spec.tiers[1].factors]}
    window = {"original_max_position_embeddings": WINDOW}
    lists |= {key: value for key, value in query_scale(spec.family).items() if key not in window}
    new = {"rope_type": "longrope", **lists, "rope_theta": spec.base, **window}
    if "partial_rotary_factor" in plain:
        new["partial_rotary_factor"] = plain["partial_rotary_factor"]
    bare = {key: value for key, value in plain.items() if key not in ("rope_theta", "partial_rotary_factor")}
    stated = {"rope_type": "longrope", "type": "longrope", **lists, **window, "factor": 2.0}
    return {
        "type": {**plain, **window, "rope_scaling": {"type": "longrope", **lists}},
        "rope_type": {**plain, **window, "rope_scaling": {"rope_type": "longrope", **lists}},
        "both type keys": {**plain, **window, "rope_scaling": {"type": "longrope", "rope_type": "longrope", **lists}},
        "su": {**plain, **window, "rope_scaling": {"type": "su", **lists}},
        "su, window inside": {**plain, **window, "rope_scaling": {"type": "su", **lists, **window}},
        "all keys": {**plain, **window, "rope_scaling": stated},
        "window inside only": {**plain, "rope_scaling": {"type": "longrope", **lists, **window}},
        "window inside, factor": {**plain, "rope_scaling": stated},
        "no window": {**plain, "rope_scaling": {"type": "longrope", **lists}},
        "as version 5 saves it": {**bare, **window, "rope_parameters": new},
        "version 5, no top level": {**bare, "rope_parameters": new},
        "both sections": {**plain, **window, "rope_scaling": {"type": "longrope", **lists}, "rope_parameters": new},
        "no head_dim": {**without(plain, "head_dim"), **window, "rope_scaling": {"type": "longrope", **lists}},
    }


# Phi-3.5-MoE has other keys, and is asked below.
ASKED = [family for family in FAMILIES if family != "phimoe"]
# What a version loads with no spelling of longrope.
REFUSED = {("transformers 4.57, native", family) for family in FAMILIES if get_family(family).hf_oldest is not None}


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def row_of(name: str, family: str) -> Engine:
    return next(row for row in ENGINES if row.name == name and family in (row.families or FAMILIES))


def said(name: str, spec: RopeSpec, family: str, configs: dict[str, Config]) -> dict[str, str]:
    """The table's verdict on each config."""
    row = row_of(name, family)
    return {spelling: verdict_on([row], spec, family, config).outcome for spelling, config in configs.items()}


class Asked:
    """A pico model's weights under one config after the other, in one version."""

    def __init__(self, source: Path, folder: Path, version: tuple[str, str | None, Interpreter]) -> None:
        self.folder = Path(shutil.copytree(source, folder))
        self.name, self._python, self._interpreter = version
        self.plain: Config = json.loads((source / "config.json").read_text())
        for key in ("original_max_position_embeddings", "rope_parameters"):
            self.plain.pop(key, None)
        self.plain["max_position_embeddings"] = LONGEST
        self.model = open_model(source)
        self.reference = ReferenceRunner(self.model)
        self.tokens = stream(self.model.shape.vocab, LONGEST)

    def open(self, config: Config) -> transformers.TransformersSession:
        (self.folder / "config.json").write_text(json.dumps(config))
        return transformers.open_session(
            self.folder, custom=False, python=self._python, interpreter=self._interpreter, threads=1
        )

    def outcome(self, config: Config, spec: RopeSpec) -> str:
        """What the version makes of a config: as the table's verdicts call it."""
        try:
            session = self.open(config)
        except InputError:
            return "refuses"
        found = [
            compare(
                self.reference.answer(spec, self.tokens[:length], length, np.arange(length)),
                session.logits([self.tokens[:length].tolist()], keep=range(length))[0],
            ).kl_mean
            for length in (WINDOW, WINDOW + 1)
        ]
        session.close()
        assert max(found) < SAME or max(found) > OTHER, found  # nothing between: a verdict is never a matter of noise
        return "right" if max(found) < SAME else "differs"


@pytest.fixture
def asked(
    pico_folder: Callable[..., Path], tmp_path: Path, version: tuple[str, str | None, Interpreter]
) -> Callable[..., Asked]:
    return lambda family, **changes: Asked(pico_folder(family, **changes), tmp_path / family, version)


@pytest.mark.parametrize("family", ASKED)
def test_every_spelling_does_what_the_table_says(asked: Callable[..., Asked], family: str) -> None:
    """Right, differs, refuses: the verdict on each config is what the version does with it."""
    # A size of heads that a config need not state: hidden size over heads.
    changes = {} if family == "qwen3" else {"head_dim": 16}
    there = asked(family, **changes)
    spec = spec_of(there.model)
    configs = spellings(spec, there.plain)
    if family in ("qwen3", "gemma3_text", "glm4", "ministral3"):
        del configs["no head_dim"]  # their heads are wider than that, and so are those that their classes assume
    seen = {name: there.outcome(config, spec) for name, config in configs.items()}
    assert seen == said(there.name, spec, family, configs)
    for other in VERSIONS.keys() - {there.name}:  # one row for both would be false
        assert seen != said(other, spec, family, configs)
    if (there.name, family) in REFUSED:
        always = {"refuses", "differs"} if get_family(family).query_scale is None else {"refuses"}  # no such class
        assert set(seen.values()) == always
        return
    assert {"right", "refuses"} <= set(seen.values())


@pytest.mark.parametrize("family", ASKED)
def test_a_stated_attention_factor_is_the_configs_or_the_formulas(asked: Callable[..., Asked], family: str) -> None:
    """With the key and without it, where the recipe's is not the formula's."""
    there = asked(family)
    spec = spec_of(there.model, 1.3)
    configs = spellings(spec, there.plain)
    if (there.name, family) in REFUSED:
        assert there.outcome(configs["type"], spec) == "refuses"
        return
    for name in ("type", "as version 5 saves it"):
        section = "rope_scaling" if "rope_scaling" in configs[name] else "rope_parameters"
        stated = {**configs[name], section: {**configs[name][section], "attention_factor": 1.3}}
        row = row_of(there.name, family)
        assert there.outcome(stated, spec) == verdict_on([row], spec, family, stated).outcome, name
        if family == "phi3":  # others state it in whatever lrconvert writes
            config = configs[name]
            assert there.outcome(config, spec) == verdict_on([row], spec, family, config).outcome == "differs", name


@pytest.mark.parametrize("family", ASKED)
def test_stale_keys_and_shared_sets_are_where_the_table_says(asked: Callable[..., Asked], family: str) -> None:
    """`generate` across the window against fresh passes; a batch with rows on both sides against each row alone."""
    there = asked(family)
    spec = spec_of(there.model)
    if (there.name, family) in REFUSED:
        assert row_of(there.name, family).rule.chooses == "not at all"
        return
    limits = " / ".join(row_of(there.name, family).rule.limits)
    spelling = {"granite": "both type keys", "olmo3": "all keys", "gemma3_text": "all keys"}.get(family, "type")
    session = there.open(spellings(spec, there.plain)[spelling])
    prompt = there.tokens[: WINDOW - 4]
    tokens, answers = session.generate(prompt.tolist(), 8)
    exact = compare(there.reference.decoded(spec, prompt, tokens), answers).kl_mean
    rows = [there.tokens[: WINDOW + 3].tolist(), there.tokens[: WINDOW - 3].tolist()]
    _, short = session.logits(rows, keep=range(-8, 0))
    keep = np.arange(WINDOW - 11, WINDOW - 3)
    alone = there.reference.answer(spec, np.asarray(rows[1]), WINDOW - 3, keep)
    shared = compare(alone, short).kl_mean
    session.close()
    assert (exact > OTHER, exact < SAME) == ("keeps keys" in limits, "keeps keys" not in limits), exact
    assert (shared > OTHER) == ("a batch shares one set" in limits), shared


def test_the_rows_name_the_versions_that_are_asked(version: tuple[str, str | None, Interpreter], asked: Any) -> None:
    """The version in the table is the one that answered."""
    there = asked("llama")
    session = there.open(spellings(spec_of(there.model), there.plain)["type"])
    rows = [row for row in ENGINES if row.name == there.name]
    assert {row.version for row in rows} == {session.info["transformers"]}
    session.close()


PHIMOE = """
import json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch, transformers
from transformers import PhimoeConfig, PhimoeForCausalLM
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

def model(factor):
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [factor] * 8, "short_mscale": 1.0,
               "long_mscale": 1.0, "original_max_position_embeddings": 64}
    torch.manual_seed(0)
    made = PhimoeForCausalLM(PhimoeConfig(
        vocab_size=101, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=2, max_position_embeddings=128, original_max_position_embeddings=64,
        rope_scaling=scaling, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    for name, weight in made.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weight.data.mul_(20)
    return made

ids = torch.randint(0, 101, (1, 65), generator=torch.Generator().manual_seed(1))
with torch.inference_mode():
    two, eight = model(2.0), model(8.0)
    prompt = ids[:, :60]
    made = eight.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8,
                          min_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    stale = max((eight(made.sequences[:, :60 + i], use_cache=False).logits[0, -1] - logits[0]).abs().max().item()
                for i, logits in enumerate(made.logits))
    moved = [(two(ids[:, :n], use_cache=False).logits - eight(ids[:, :n], use_cache=False).logits).abs().max().item()
             for n in (64, 65)]
print(json.dumps([transformers.__version__, *moved, stale]))
"""


@pytest.mark.parametrize("name", VERSIONS.values())
def test_phimoe_reads_its_long_set_or_does_not(name: str) -> None:
    """Logits within the window and one past it, with one long set and with another; and `generate` across it."""
    python = OLDEST if "4.57" in name else None
    done = subprocess.run([python or sys.executable, "-c", PHIMOE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    version, within, past, stale = json.loads(done.stdout.splitlines()[-1])
    (row,) = (row for row in ENGINES if row.name == name and "phimoe" in (row.families or ()))
    assert row.version == version
    assert within == 0.0  # the short set is the same in both
    assert (past > OTHER) == (row.rule.breaks is None), past
    assert stale < 1e-4 and not any("keeps keys" in limit for limit in row.rule.limits)  # a stale key: 0.5
