# SPDX-License-Identifier: Apache-2.0
"""What int4 and int8 cost in ONNX folders, and whether `verify` predicts the part of it that is ONNX Runtime's.

    python benchmarks/onnx_quantised.py MODEL --name NAME [--recipe R] [--dtype int4 int8] [--text FILE] [--lengths N …]
        [--no-mistakes] [--scratch DIR]

1. Weights: megabytes, and over 1,024 tokens of text the mean KL to the folder in f32 and the perplexity of both. Beside
   it, by the reference: the KL of the layers' weights alone, embedding and head as they were.
2. Activations, which products round to 8 bits: how far ONNX Runtime's answers are from the reference on the folder's
   own weights at every length, and how far `verify` predicts them to be. Prompts as `verify` asks them.
3. Mistakes: folders with one each (`lrconvert.parity.mutants`), verified with `--profile quick`: the rows that fail,
   and how many times a bound.

Results are kept by model; results/onnx-quantised.md has all of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, Figure, report, scratch_folder

from lrconvert import parity
from lrconvert.artifact.bake import bake
from lrconvert.artifact.manifest import MANIFEST
from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.base import CheckpointView
from lrconvert.checkpoint.blocks import Block
from lrconvert.checkpoint.onnx_folder import TIED_HEAD, OnnxCheckpoint
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.data import DATA
from lrconvert.parity import Options
from lrconvert.parity.cases import SPREAD_TOKENS, Case, kept, stream
from lrconvert.parity.measures import compare, merge
from lrconvert.parity.mutants import RECIPE_MUTANTS
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.parity.stored import on_stored_weights
from lrconvert.recipe import Recipe, load_recipe
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.onnxruntime import RUNTIME
from lrconvert.targets import onnx, target_of

NAME, TOKENS, PART = "onnx-quantised", 1024, 128
(BACKEND,) = RUNTIME.backends
OPTIONS = Options(threads=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", required=True)
    parser.add_argument("--recipe", default="demo-8x")
    parser.add_argument("--dtype", nargs="+", default=["int4", "int8"], choices=["int4", "int8"])
    parser.add_argument("--text", type=Path, default=DATA / "demo" / "heldout.txt")
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 512, 4096, 8192, 8193, 16384, 32768])
    parser.add_argument("--no-mistakes", dest="mistakes", action="store_false")
    parser.add_argument("--scratch", type=Path)
    asked = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    model, recipe = open_model(asked.model), load_recipe(asked.recipe)
    with scratch_folder(asked.scratch) as scratch:
        exact = baked(model, recipe, scratch / "f32", "f32")
        tokens = tokenizer_of(exact)(asked.text.read_text(encoding="utf-8"))[:TOKENS]
        for dtype in asked.dtype:
            folder = baked(model, recipe, scratch / dtype, dtype)
            found = {"date": date.today().isoformat(), "recipe": recipe.name, "text": asked.text.name}
            found |= {"versions": versions(), "weights": weights(model, recipe, exact, folder, tokens)}
            found["activations"] = list(activations(model, recipe, folder, asked.lengths))
            if asked.mistakes:
                found["mistakes"] = dict(mistakes(model, recipe, folder, dtype, scratch))
            known[f"{asked.name}, {dtype}"] = found
            costs = found["weights"]
            what, after, before = (
                f"perplexity in ONNX {dtype}, {asked.name}",
                *(costs[key] for key in ("perplexity", "perplexity_f32")),
            )
            report(Figure(what, after, "", "f32", before))
            path.write_text(json.dumps(known, indent=1) + "\n")
    text = table(known)
    (RESULTS / f"{NAME}.md").write_text(text)
    print(text)


def baked(model: Model, recipe: Recipe, folder: Path, dtype: str) -> Path:
    if not folder.exists():
        bake(onnx.plan(model, recipe, folder, onnx.Options(dtype=dtype)))
    return folder


# --- what types cost --------------------------------------------------------------------------------------------


def weights(model: Model, recipe: Recipe, exact: Path, folder: Path, tokens: list[int]) -> dict[str, Any]:
    spec, stored = model.resolve(recipe), on_stored_weights(model, OnnxCheckpoint(folder))
    plain, narrow = (answers(each, tokens) for each in (exact, folder))
    tables = [tensor.name for (role, *_), tensor in stored.roles.items() if role in ("embedding", "lm_head")]
    layers = replaced(stored, model, tables)
    ours, whole, alone = (by_reference(each, spec, tokens) for each in (model, stored, layers))
    return {
        "mb": round(sum(file.stat().st_size for file in (folder / "onnx").iterdir()) / 1e6, 1),
        "kl_to_f32": mean_kl(plain, narrow),
        "perplexity_f32": perplexity(plain, tokens),
        "perplexity": perplexity(narrow, tokens),
        "kl_of_weights": mean_kl(ours, whole),
        "kl_of_layers": mean_kl(ours, alone),
    }


def answers(folder: Path, tokens: list[int]) -> np.ndarray:
    with closing(BACKEND.open(folder, OPTIONS)) as session:
        return session.logits([tokens], keep=range(len(tokens)))[0]


def by_reference(model: Model, spec: RopeSpec, tokens: list[int]) -> np.ndarray:
    return ReferenceRunner(model).answer(spec, tokens, len(tokens), np.arange(len(tokens)))


class Tables(CheckpointView):
    """A folder's weights with those of the model for some names."""

    def __init__(self, stored: Model, model: Model, names: list[str]) -> None:
        super().__init__(stored.checkpoint, names)
        self._model, self._names = model, names

    def blocks(self, name: str) -> Iterator[Block]:
        if name not in self._names:
            return super().blocks(name)
        source = self._model.roles["embedding", None].name if name == TIED_HEAD and self._model.shape.tied else name
        return self._model.checkpoint.blocks(source)


def replaced(stored: Model, model: Model, names: list[str]) -> Model:
    return replace(stored, checkpoint=Tables(stored, model, names))


def mean_kl(right: np.ndarray, found: np.ndarray) -> float:
    """In parts: logits of a large vocabulary are gigabytes."""
    parts = [(right[at : at + PART], found[at : at + PART]) for at in range(0, len(right), PART)]
    return rounded(merge([compare(*each) for each in parts], [len(each[0]) for each in parts]).kl_mean)


def perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    """Of every token but the first."""
    losses = []
    for at in range(0, len(tokens) - 1, PART):
        part = logits[at : min(at + PART, len(tokens) - 1)]
        shifted = part - part.max(axis=-1, keepdims=True)
        wanted = np.asarray(tokens[at + 1 : at + 1 + len(part)])
        losses.append(np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(part)), wanted])
    return round(float(np.exp(np.concatenate(losses).mean())), 1)


# --- what rounding activations costs, and what is predicted --------------------------------------------------------


def activations(model: Model, recipe: Recipe, folder: Path, lengths: list[int]) -> Iterator[dict[str, Any]]:
    spec = model.resolve(recipe)
    exact = ReferenceRunner(on_stored_weights(model, OnnxCheckpoint(folder)))
    predicted = exact.rounded(BACKEND.rounding(folder, OPTIONS, "INT8"))
    with closing(BACKEND.open(folder, OPTIONS)) as session:
        for length in lengths:
            case = Case(f"{length}", "forward", (length,), spread=length > SPREAD_TOKENS)
            where = case.positions() if case.spread else np.arange(length)
            tokens = stream(model.shape.vocab, len(where)).tolist()
            (answer,) = session.logits([tokens], positions=where.tolist(), keep=kept(len(tokens)).tolist())
            right, rounding = exact.forward(spec, case), predicted.forward(spec, case)
            found, foreseen = compare(right, answer), compare(right, rounding)
            yield {
                "length": length,
                "kl_mean": rounded(found.kl_mean),
                "predicted": rounded(foreseen.kl_mean),
                "kl_max": rounded(found.kl_max),
                "predicted_max": rounded(foreseen.kl_max),
                "kl_to_rounded": rounded(compare(rounding, answer).kl_mean),
            }


def mistakes(
    model: Model, recipe: Recipe, folder: Path, dtype: str, scratch: Path
) -> Iterator[tuple[str, dict[str, float]]]:
    """What fails, and how many times its bound: 0 where it is not the logits that tell."""
    for name, change in {"none": lambda right: right, **RECIPE_MUTANTS}.items():
        wrong = change(recipe)
        if wrong is None:
            continue
        broken = scratch / f"{dtype}-{name.replace(' ', '-')}"
        shutil.copytree(folder, broken)
        (broken / MANIFEST).unlink()
        planned = onnx.plan(model, wrong, scratch / "unwritten", onnx.Options(dtype=dtype))
        (broken / "onnx/model.onnx").write_bytes(planned.texts["onnx/model.onnx"])
        report = parity.verify(
            broken,
            target_of(broken),
            against=model.reference,
            recipe=recipe,
            options=Options(threads=1, profile="quick"),
        )
        shutil.rmtree(broken)
        hits = {}
        for row in report.failed:
            times = 0.0 if row.kl_mean is None or not row.bound else row.kl_mean / row.bound
            hits[f"{row.code}: {row.case}"] = rounded(times)
        yield name, hits


# --- writing it down ----------------------------------------------------------------------------------------------


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("onnxruntime", "onnx", "torch", "numpy")}


def table(known: dict[str, Any]) -> str:
    days = ", ".join(sorted({found["date"] for found in known.values()}))
    (used,) = {json.dumps(found["versions"]) for found in known.values()}
    lines = [
        "# int4 and int8 in ONNX folders",
        "",
        f"`benchmarks/onnx_quantised.py`, {days}, {used}. KL in nats, mean over positions.",
        "",
        "| model | MB | KL to f32 | perplexity, f32 | perplexity | by the reference: weights | layers alone |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in known.items():
        lines.append(f"| {name} | {' | '.join(str(value) for value in found['weights'].values())} |")
    lines += ["", "Activations rounded to 8 bits: ONNX Runtime against the reference on the same weights.", ""]
    lines += ["| model | length | KL | predicted | largest KL | predicted | KL to the reference that rounds |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for name, found in known.items():
        lines += [f"| {name} | {' | '.join(str(each) for each in row.values())} |" for row in found["activations"]]
    lines += ["", "Mistakes, `--profile quick`: how many rows on the graph fail, which logits by how many bounds.", ""]
    lines += ["| model | mistake | graph | logits |", "|---|---|---:|---|"]
    for name, found in known.items():
        for mistake, hits in found.get("mistakes", {}).items():
            told = [f"{what.partition(': ')[2]} ({times:g}x)" for what, times in hits.items() if times]
            read = sum(not times for times in hits.values())
            lines.append(f"| {name} | {mistake} | {read or ''} | {'; '.join(told) or 'nothing'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
