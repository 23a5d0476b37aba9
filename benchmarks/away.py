# SPDX-License-Identifier: Apache-2.0
"""Short benchmarks and RULER of a model on a machine that has no lm-eval: asked here, answered there, counted here.

    python benchmarks/away.py ask ARTIFACT --data DIR --limit 300 --ruler 4096 16384 --samples 5 -o asked.npz
    python benchmarks/away.py answer asked.npz ARTIFACT --device cuda -o answers.npz      # there
    python benchmarks/away.py count asked.npz answers.npz ARTIFACT … -o extension-benchmarks-NAME.json

`ask` runs lm-eval's own code over a session that answers nothing and writes down what it was asked; `count` runs it
again over one that gives the answers. `answer` keeps what it has after `--seconds` and ends with exit code 75; the same
command goes on from there. The questions, the seed and the scores are those of `lrconvert eval benchmarks`
and `lrconvert eval ruler`. `count` takes the options of `ask`, and refuses answers to other questions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import save

from lrconvert.evals.subject import Subject, opened
from lrconvert.precision import long_name
from lrconvert.runtimes.base import Scores, Session

TASKS = ("arc_challenge", "hellaswag", "truthfulqa_mc2")
Pair = tuple[np.ndarray, np.ndarray]  # losses and preferred tokens, or new tokens and preferred ones
Call = tuple[str, list[list[int]], list[int]]  # "score" or "generate"; rows; judged tokens of each, or how many are new


class Asked:
    """A session that writes down what it is asked, or gives answers that were made elsewhere."""

    def __init__(self, vocabulary: int, ready: Iterator[Any] | None = None) -> None:
        self.info: dict[str, Any] = {}
        self.answers = frozenset[str]()
        self.vocabulary, self.calls, self._ready = vocabulary, list[Call](), ready

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        self.calls.append(("score", [list(row) for row in rows], list(judged)))
        if self._ready is None:
            return [Scores(np.ones(count), np.zeros(count, bool)) for count in judged]
        found = []
        for count in judged:
            losses, preferred = next(self._ready)
            assert len(losses) == count
            found.append(Scores(losses.astype(np.float64), preferred.astype(bool)))
        return found

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
        self.calls.append(("generate", [list(prompt)], [new_tokens]))
        tokens = np.zeros(new_tokens, np.int64)
        preferred = tokens
        if self._ready is not None:
            tokens, preferred = next(self._ready)
        logits = np.zeros((new_tokens, self.vocabulary))
        logits[np.arange(new_tokens), preferred] = 1.0
        return tokens.tolist(), logits


def digest(calls: Sequence[Call]) -> str:
    return hashlib.sha256(json.dumps(calls).encode()).hexdigest()


def run(options: argparse.Namespace, session: Any) -> dict[str, Any]:
    """The whole evaluation over a session: rows of benchmarks and of RULER."""
    from lrconvert.evals.benchmarks import measure_benchmarks, session_model
    from lrconvert.evals.ruler import measure_ruler, prepare_ruler
    from lrconvert.evals.ruler_tasks import OFFLINE
    from lrconvert.evals.tasks import prepare

    rows: dict[str, Any] = {"benchmarks": [], "ruler": []}
    if options.data:
        asked = prepare(TASKS, folder=options.data, shots=None, limit=options.limit, seed=0)
        model = session_model(session, options.artifact, 32768)
        rows["benchmarks"] = [row.to_json() for row in measure_benchmarks(model, asked, 0)]
    if options.ruler:
        prepared = prepare_ruler(OFFLINE, options.ruler, options.samples, options.artifact)
        rows["ruler"] = [row.to_json() for row in measure_ruler(session, prepared, options.artifact)]
    return rows


def ask(options: argparse.Namespace) -> None:
    session = Asked(_vocabulary(options.artifact))
    run(options, session)
    arrays: dict[str, Any] = dict(_packed(session.calls))
    np.savez_compressed(options.output, **arrays)
    counts = {kind: sum(call[0] == kind for call in session.calls) for kind in ("score", "generate")}
    tokens = sum(len(row) for call in session.calls for row in call[1])
    print(f"{options.output}: {counts}, {tokens:,} tokens, sha256 {digest(session.calls)[:12]}")


def _packed(calls: Sequence[Call]) -> Iterator[tuple[str, np.ndarray]]:
    yield "kinds", np.array([call[0] for call in calls])
    yield "rows", np.array([len(call[1]) for call in calls])
    yield "lengths", np.array([len(row) for call in calls for row in call[1]])
    yield "tokens", np.concatenate([np.asarray(row, np.uint32) for call in calls for row in call[1]])
    yield "counts", np.concatenate([np.asarray(call[2]) for call in calls])


def _unpacked(path: Path) -> list[Call]:
    with np.load(path, allow_pickle=False) as held:
        kinds, counts_of_rows = held["kinds"].tolist(), held["rows"].tolist()
        ends = np.cumsum(held["lengths"])
        rows = iter([part.tolist() for part in np.split(held["tokens"].astype(np.int64), ends[:-1])])
        counts = iter(held["counts"].tolist())
    return [
        (kind, [next(rows) for _ in range(count)], [next(counts) for _ in range(count)])
        for kind, count in zip(kinds, counts_of_rows, strict=True)
    ]


def answer(options: argparse.Namespace) -> None:
    calls = _unpacked(options.asked)
    found, before = _answered(options.output, digest(calls))
    started = time.monotonic()
    machine = {"device": options.device, "dtype": long_name(options.dtype)}
    with opened(Subject.of(str(options.artifact)), text=False, **machine) as (session, _):
        for number, (kind, rows, counts) in enumerate(calls[len(found) :], len(found) + 1):
            found.append(list(_answers(session, kind, rows, counts)))
            spent = time.monotonic() - started
            if number % 50 == 0 or number == len(calls) or spent > options.seconds:
                info = {**session.info, "seconds": round(before + spent, 1)}
                _keep(options.output, found, digest(calls), info)
                print(f"{number} of {len(calls)}, {spent:.0f} s", flush=True)
            if spent > options.seconds and number < len(calls):
                sys.exit(75)


def _keep(path: Path, found: Sequence[Sequence[Pair]], asked: str, info: dict[str, Any]) -> None:
    """Answers so far, whole or not at all."""
    pairs = [pair for call in found for pair in call]
    arrays: dict[str, Any] = {
        "rows": np.array([len(call) for call in found]),
        "lengths": np.array([len(first) for first, _ in pairs]),
        "asked": np.array(asked),
        "info": np.array(json.dumps(info)),
        "first": np.concatenate([first for first, _ in pairs]).astype(np.float64),
        "second": np.concatenate([second for _, second in pairs]).astype(np.float64),
    }
    with path.with_suffix(".part").open("wb") as file:
        np.savez_compressed(file, **arrays)
    path.with_suffix(".part").replace(path)


def _answered(path: Path, asked: str) -> tuple[list[list[Pair]], float]:
    """What an answer that was stopped left: its calls' answers and the seconds that they took."""
    if not path.exists():
        return [], 0.0
    with np.load(path, allow_pickle=False) as held:
        if str(held["asked"]) != asked:
            sys.exit(f"{path} answers other questions than these")
        ends = np.cumsum(held["lengths"])[:-1]
        pairs = iter(zip(np.split(held["first"], ends), np.split(held["second"], ends), strict=True))
        return [[next(pairs) for _ in range(rows)] for rows in held["rows"]], json.loads(str(held["info"]))["seconds"]


def _answers(session: Session, kind: str, rows: list[list[int]], counts: list[int]) -> Iterator[Pair]:
    """For each row two arrays: losses and preferred of judged tokens, or new tokens and the preferred ones."""
    if kind == "score":
        yield from ((scores.losses, scores.preferred) for scores in session.score(rows, counts))
        return
    tokens, logits = session.generate(rows[0], counts[0])
    if not np.isfinite(logits).all():
        raise ValueError("logits that are no numbers")
    yield np.asarray(tokens), logits.argmax(axis=-1)


def count(options: argparse.Namespace) -> None:
    with np.load(options.answers, allow_pickle=False) as held:
        ends = np.cumsum(held["lengths"])[:-1]
        first, second = np.split(held["first"], ends), np.split(held["second"], ends)
        asked, info = str(held["asked"]), json.loads(str(held["info"]))
    pairs = zip(first, second, strict=True)
    ready = ((one.astype(np.int64) if (one == one.astype(np.int64)).all() else one, other.astype(np.int64))
             for one, other in pairs)  # fmt: skip
    session = Asked(_vocabulary(options.artifact), ready)
    rows = run(options, session)
    if digest(session.calls) != asked:
        sys.exit(f"{options.answers} answers other questions than these")
    print(json.dumps({task["task"]: task["score"] for task in rows["benchmarks"]}, indent=1))
    for row in rows["ruler"]:
        print(row["task"], row["length"], row["score"]["value"])
    if options.output:
        save(options.output, {"artifact": options.artifact.name, "runtime": info, **rows})


def _vocabulary(artifact: Path) -> int:
    return int(json.loads((artifact / "config.json").read_text())["vocab_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for name, verb, paths in (
        ("ask", ask, ("artifact",)),
        ("answer", answer, ("asked", "artifact")),
        ("count", count, ("asked", "answers", "artifact")),
    ):
        one = verbs.add_parser(name)
        one.set_defaults(verb=verb)
        for path in paths:
            one.add_argument(path, type=Path)
        one.add_argument("-o", "--output", type=str if verb is count else Path, default=None)
        if verb is answer:
            one.add_argument("--device", default="cuda")
            one.add_argument("--dtype", default="bf16")
            one.add_argument("--seconds", type=float, default=float("inf"), help="keep what there is then, and stop")
        else:
            one.add_argument("--data", type=Path)
            one.add_argument("--limit", type=int, default=300)
            one.add_argument("--ruler", type=int, nargs="*", default=())
            one.add_argument("--samples", type=int, default=5)
    options = parser.parse_args()
    options.verb(options)


if __name__ == "__main__":
    main()
