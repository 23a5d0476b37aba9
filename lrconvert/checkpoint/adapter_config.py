# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json of a LoRA in PEFT layout: what merging needs of it, and the refusal of all the rest.

The fields are those of peft 0.21.2 (`peft/tuners/lora/config.py`, `peft/config.py`). `NEUTRAL` says of every
field with which values it leaves the merged weights alone; any other value, and any key that isn't there and
isn't off, is refused by name: a feature that we don't know may change every weight.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.checkpoint.base import read_json
from lrconvert.errors import InputError, UnsupportedError

CONFIG = "adapter_config.json"
MAX_RANK = 2**20
MAX_PATTERNS = 10_000
MAX_PATTERN_CHARS = 1000
MAX_QUANTIFIERS = 3

_OFF: tuple[Any, ...] = (None, False)
# Field → the values that change nothing; None: any value, since merging reads it below, or it says how the
# adapter was trained or started, which its tensors already show.
NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "alora_invocation_tokens": (None, []),
    "alpha_pattern": None,
    "arrow_config": _OFF,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": ("none",),
    "corda_config": None,  # counts with init_lora_weights "corda" alone; so do the next two with theirs
    "eva_config": None,
    "loftq_config": None,
    "lora_ga_config": None,
    "ensure_weight_tying": None,
    "exclude_modules": None,
    "fan_in_fan_out": None,  # peft itself turns it off for nn.Linear, the only kind of layer in our families
    "inference_mode": None,
    # The others (pissa, olora, corda, loftq, lora_ga) change the base weights when the adapter is created.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
    "kasa_config": _OFF,
    "layer_replication": (None, []),
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": None,
    "lora_bias": _OFF,
    "lora_dropout": None,
    "megatron_config": _OFF,
    "megatron_core": None,
    "modules_to_save": None,
    "monteclora_config": _OFF,
    "peft_type": None,
    "peft_version": None,
    "qalora_group_size": None,
    "r": None,
    "rank_pattern": None,
    "revision": None,
    "runtime_config": None,  # peft ignores it in a file
    "target_modules": None,
    "target_parameters": (None, []),
    "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION"),
    "trainable_token_indices": None,
    "use_bdlora": _OFF,
    "use_dora": None,
    "use_qalora": _OFF,
    "use_rslora": None,
    "velora_config": _OFF,
}
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What decides how an adapter's tensors are merged. Module names are those of the base model."""

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    rslora: bool
    dora: bool
    saved: tuple[str, ...]  # modules_to_save: suffixes of module names
    base: str | None  # what the adapter says it was trained on
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()  # rows that were trained alone, by suffix of a module's name

    def rank_of(self, module: str) -> int:
        """The rank r of a module's pair."""
        return _lookup(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What multiplies B·A: α/r, or α/√r for rank-stabilised LoRA."""
        rank, alpha = self.rank_of(module), _lookup(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The rows of a module that were trained alone."""
        return next((rows for suffix, rows in self.tokens if module.endswith(suffix)), ())

    def saves(self, module: str) -> bool:
        """Whether modules_to_save names the module; by suffix, as in peft ("norm" names every layer norm)."""
        return any(module.endswith(suffix) for suffix in self.saved)


def _lookup(patterns: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    """The value of the first pattern that matches, in file order (peft: `get_pattern_key`)."""
    for pattern, value in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return dict(patterns).get(module, default)


def read_adapter_config(path: Path) -> AdapterConfig:
    """The checked config.

    Raises `UnsupportedError` that names every feature that can't be merged, and `InputError` that names every
    value that is none at all.
    """
    values = read_json(path)
    if (kind := values.get("peft_type")) != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {_short(kind)}; only LORA adapters can be merged")
    refused = [f"{key} {_short(value)}" for key, value in values.items() if not _neutral(key, value)]
    if refused:
        started = values.get("init_lora_weights")
        alters = isinstance(started, str) and started.lower().startswith(_ALTERS_BASE)
        raise UnsupportedError(
            f"{path}: features that lrconvert doesn't merge: {', '.join(refused)}",
            remedy="That initialisation changes the base weights: save the adapter as plain LoRA with peft's "
            "path_initial_model_for_weight_conversion"
            if alters
            else None,
        )
    reader = _Reader(values)
    config = AdapterConfig(
        rank=reader.rank("r", values.get("r", 8)),
        alpha=reader.number("lora_alpha", values.get("lora_alpha", 8)),
        rank_pattern=tuple((key, reader.rank(f"rank_pattern {key}", v)) for key, v in reader.patterns("rank_pattern")),
        alpha_pattern=tuple(
            (key, reader.number(f"alpha_pattern {key}", v)) for key, v in reader.patterns("alpha_pattern")
        ),
        rslora=reader.flag("use_rslora"),
        dora=reader.flag("use_dora"),
        saved=reader.names("modules_to_save"),
        base=reader.text("base_model_name_or_path"),
        tokens=reader.rows("trainable_token_indices"),
    )
    if reader.problems:
        raise InputError.collect(path, reader.problems)
    if reader.unsafe:
        raise UnsupportedError(
            f"{path}: regular expressions too complex to run safely: {', '.join(reader.unsafe)}",
            remedy="Name the modules in full",
        )
    return config


def _neutral(key: str, value: Any) -> bool:
    allowed = NEUTRAL.get(key, _OFF)
    return allowed is None or any(value is option or (value == option and type(value) is type(option))
                                  for option in allowed)  # fmt: skip


def _short(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Reader:
    """Reads checked values; remembers all problems."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.problems: list[str] = []
        self.unsafe: list[str] = []

    def rank(self, what: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
            self.problems.append(f"{what} is {_short(value)}; an integer from 1 to {MAX_RANK} is needed")
            return 1
        return value

    def number(self, what: str, value: Any) -> float:
        # 2**128 is beyond what float32, in which the weights are merged, can hold
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2.0**128:
            self.problems.append(f"{what} is {_short(value)}; a number is needed")
            return 1.0
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool | None):
            self.problems.append(f"{key} is {_short(value)}; true or false is needed")
        return value is True

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if not isinstance(value, str | None):
            self.problems.append(f"{key} is {_short(value)}; a string is needed")
            return None
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            self.problems.append(f"{key} is {_short(value)}; a list of module names is needed")
            return ()
        return tuple(value)

    def rows(self, key: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Rows by module; a plain list is the input embedding's."""
        value = self.values.get(key) or {}
        value = {"embed_tokens": value} if isinstance(value, list) else value
        lists = list(value.values()) if isinstance(value, dict) else [None]
        if not all(isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows) for rows in lists):
            self.problems.append(f"{key} is {_short(value)}; lists of row numbers by module are needed")
            return ()
        return tuple((str(module), tuple(rows)) for module, rows in value.items())

    def patterns(self, key: str) -> list[tuple[str, Any]]:
        """The items of a pattern dictionary whose keys are regular expressions that are safe to run."""
        value = self.values.get(key)
        value = {} if value is None else value
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            self.problems.append(f"{key} is {_short(value)}; an object of at most {MAX_PATTERNS} patterns is needed")
            return []
        self.problems += [f"{key} {_short(p)} is not a regular expression" for p in value if not _compiles(p)]
        self.unsafe += [f"{key} {_short(p)}" for p in value if len(p) > MAX_PATTERN_CHARS or not _bounded(p)]
        return [] if self.problems or self.unsafe else list(value.items())


def _compiles(pattern: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's doubts about its future syntax
            re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _bounded(pattern: str) -> bool:
    """Whether matching a module name takes polynomial time of a low degree: few quantifiers, none of a group."""
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    quantifiers = re.findall(r"[*+?{]", plain.replace("(?", "("))
    return len(quantifiers) <= MAX_QUANTIFIERS and not re.search(r"\)[*+?{]", plain)
