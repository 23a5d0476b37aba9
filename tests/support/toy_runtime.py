# SPDX-License-Identifier: Apache-2.0
"""A runtime in one file: Llama in NumPy, over the native keys of a folder. What it takes to add one, and no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from lrconvert.engines.capability import Capability
from lrconvert.runtimes.backend import Backend, OpenOptions, Runtime
from lrconvert.runtimes.base import Scores, score_by_logits
from lrconvert.runtimes.tolerances import ANY, Tolerance


class ToySession:
    """A Llama folder with a short and a long set, in float64; keeps no cache."""

    answers: frozenset[str] = frozenset()

    def __init__(self, artifact: Path) -> None:
        self.config = json.loads((artifact / "config.json").read_text())
        self.weights = {
            name: values.astype(np.float64)
            for file in artifact.glob("*.safetensors")
            for name, values in load_file(file).items()
        }
        self.info: dict[str, Any] = {"numpy": np.__version__, "class": "toy", "device": "cpu", "dtype": "float64"}

    def logits(
        self, rows: Sequence[Sequence[int]], *, positions: Sequence[int] | None = None, keep: Sequence[int]
    ) -> list[np.ndarray]:
        return [self._read(row, range(len(row)) if positions is None else positions)[list(keep)] for row in rows]

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        return score_by_logits(self, rows, judged)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
        tokens, found = list(prompt), []
        for _ in range(new_tokens):
            found.append(self._read(tokens, range(len(tokens)))[-1])
            tokens.append(int(found[-1].argmax()))
        return tokens[len(prompt) :], np.stack(found)

    def close(self) -> None: ...

    def _read(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """Logits [tokens, vocabulary]."""
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        hidden = self.weights["model.embed_tokens.weight"][list(tokens)]
        cos, sin = self._cos_sin(np.array(positions, dtype=np.float64))
        unseen = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)

        def product(values: np.ndarray, name: str) -> np.ndarray:
            return values @ self.weights[f"{name}.weight"].T

        def rotated(values: np.ndarray) -> np.ndarray:
            first, second = np.split(values, 2, axis=-1)
            return values * cos + np.concatenate([-second, first], axis=-1) * sin

        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            given = self._norm(hidden, f"{name}.input_layernorm")
            q, k, v = (
                product(given, f"{name}.self_attn.{part}_proj").reshape(len(tokens), count, -1).swapaxes(0, 1)
                for part, count in (("q", heads), ("k", groups), ("v", groups))
            )
            q, k, v = rotated(q), rotated(k).repeat(heads // groups, 0), v.repeat(heads // groups, 0)
            scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) + unseen
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(tokens), -1)
            hidden = hidden + product(mixed, f"{name}.self_attn.o_proj")
            given = self._norm(hidden, f"{name}.post_attention_layernorm")
            gate = product(given, f"{name}.mlp.gate_proj")
            hidden = hidden + product(
                gate / (1 + np.exp(-gate)) * product(given, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj"
            )
        return product(self._norm(hidden, "model.norm"), "lm_head")

    def _norm(self, hidden: np.ndarray, name: str) -> np.ndarray:
        mean = (hidden**2).mean(-1, keepdims=True)
        return hidden / np.sqrt(mean + self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def _cos_sin(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[tokens, head] each; the last position chooses the set."""
        scaling = self.config["rope_scaling"]
        long = positions[-1] >= scaling["original_max_position_embeddings"]
        factors = np.array(scaling["long_factor" if long else "short_factor"])
        exponents = np.arange(len(factors)) / len(factors)
        angles = positions[:, None] / (factors * self.config["rope_theta"] ** exponents)
        angles = np.concatenate([angles, angles], axis=-1)
        return np.cos(angles) * scaling["attention_factor"], np.sin(angles) * scaling["attention_factor"]


TWO_SETS = Capability("the toy", 2, False, "one", row_tiers=True, switches=True)


def _open(artifact: Path, options: OpenOptions) -> ToySession:
    return ToySession(artifact)


RUNTIME = Runtime(
    name="toy",
    runs=("hf",),
    backends=(
        Backend(
            name="toy",
            capability=lambda model: TWO_SETS,
            open=_open,
            tolerances=(Tolerance("float32", ANY, 1e-12, 1e-10, "float64 throughout, angles too"),),
        ),
    ),
)
