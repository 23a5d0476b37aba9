# SPDX-License-Identifier: Apache-2.0
"""Small files of questions, in the formats that `eval benchmarks --data` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("light", "water", "earth", "seed", "tree", "day", "night", "stars", "sea", "fish", "fowl", "beast", "man")


def arc_line(number: int) -> dict[str, Any]:
    choices = [f"the {WORDS[(number + at) % len(WORDS)]}" for at in range(3 + number % 2)]
    labels = list("ABCD" if number % 3 else "1234")[: len(choices)]
    return {
        "id": str(number),
        "question": f"What came forth on day {number}?",
        "choices": choices,
        "labels": labels,
        "answer": labels[number % len(labels)],
    }


def hellaswag_line(number: int) -> dict[str, Any]:
    return {
        "context": f"Gardening: A man plants {number} {WORDS[number % len(WORDS)]}s. he",
        "label": number % 4,
        "endings": [f"waters the {WORDS[(number + at) % len(WORDS)]} slowly." for at in range(4)],
    }


def truthfulqa_line(number: int) -> dict[str, Any]:
    return {
        "question": f"What is the {WORDS[number % len(WORDS)]} made of?",
        "best": "It is made of dust",
        "correct": ["It is made of dust", "Dust"][: 1 + number % 2],
        "incorrect": [f"It is made of {WORDS[(number + at) % len(WORDS)]}" for at in range(3)],
        "category": "Things",
    }


MAKERS = {
    "arc_challenge_test.jsonl": arc_line,
    "arc_challenge_train.jsonl": lambda number: arc_line(number + 1000),
    "hellaswag_val.jsonl": hellaswag_line,
    "truthfulqa.jsonl": truthfulqa_line,
}


def write_questions(folder: Path, count: int = 30) -> Path:
    """All four files, `count` lines each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in MAKERS.items():
        lines = [json.dumps(make(number)) for number in range(count)]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder
