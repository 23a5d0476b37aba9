# SPDX-License-Identifier: Apache-2.0
"""The log of a fine-tuning run as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrconvert.recipe.plotting import new_pyplot

SMOOTH = 10  # steps that are averaged


def plot_log(log: Path, picture: Path) -> Path:
    """Losses of text and of answers, by kind of row, and the gradient's norm, over the steps of a log.jsonl."""
    steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    pyplot = new_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
    kinds = sorted({step["kind"] for step in steps})
    for axis, key, title in zip(
        axes,
        ("text", "answers", "gradient_norm"),
        ("loss of text (nats)", "loss of answers (nats)", "norm of the gradient"),
        strict=True,
    ):
        for number, kind in enumerate(kinds):
            _draw(axis, [step for step in steps if step["kind"] == kind and key in step], key, kind, f"C{number}")
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel(title, fontsize=8)
        axis.grid(alpha=0.3)
        if key != "text":
            axis.set_yscale("log")
    if axes[0].get_legend_handles_labels()[0]:  # none of a run of a few steps
        axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return picture


def _draw(axis: Any, steps: Sequence[dict[str, Any]], key: str, kind: str, colour: str) -> None:
    """Every step pale, and the mean of the steps around it."""
    at, values = [step["step"] for step in steps], np.array([step[key] for step in steps])
    axis.plot(at, values, ".", color=colour, alpha=0.25, markersize=3)
    size = min(SMOOTH, len(values))
    if size > 1:
        mean = np.convolve(values, np.ones(size) / size, mode="valid")
        axis.plot(at[size - 1 :], mean, color=colour, label=f"{kind} rows")
