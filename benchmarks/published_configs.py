# SPDX-License-Identifier: Apache-2.0
"""Published LongRoPE sets, baked from the model's own rotation into every format and verified at their real windows.

    python benchmarks/published_configs.py FACTORS [--only phi-3.5-mini] [--formats gguf] [--widen 2 3 6] [--jobs 8]
        [--add]

FACTORS are folders of published sets as JSON (benchmarks/factors is one): `short_factor`, `long_factor` (one of them
null where a table is for one length), `head_dim`, windows and θ. They are read where they lie. Every set becomes the
config of a small random model of its family, with the set's own head size, and with q and k widened so that a wrong
rotation shows. A long LLaMA2 or Mistral table has the short 4k table of the same fine-tuned model beside it, as its
authors' loader pairs them.

Each artifact is verified as it is, with the cases and the budget of `lrconvert verify`, and once for every mistake of
`lrconvert.parity.mutants`, with prompts of 512 tokens that end at the same lengths, without decoding: fewer cases
to be caught by. The result has a row for each artifact, and what caught each mistake. `--add` keeps the rows of an
earlier run that this one does not measure again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from _common import RESULTS, Figure, bounds_away, report, save, scratch_folder, write_random

from lrconvert import parity
from lrconvert.artifact.bake import bake
from lrconvert.artifact.plan import Plan
from lrconvert.checkpoint import Model, open_model
from lrconvert.parity import Options
from lrconvert.parity.cases import SPREAD_TOKENS, Budget
from lrconvert.parity.mutants import RECIPE_MUTANTS, unpermuted_qk
from lrconvert.recipe import Recipe
from lrconvert.recipe.models import own_recipe
from lrconvert.runtimes import llama_cpp, onnxruntime, transformers
from lrconvert.runtimes.base import Interpreter
from lrconvert.targets import gguf, hf, onnx, target_of

NAME = "published-configs"
SMALL = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "phi3": "Phi3ForCausalLM"}
TABLE = re.compile(r"longrope-(llama2|mistral)-7b-(\w+)-(\d+k)")

# By format: how to plan an artifact, its name, the worker that runs it, the codes that are asked.
Planner = Callable[[Model, Recipe, Path], Plan]
FORMATS: dict[str, tuple[Planner, str, Path, tuple[str, ...]]] = {
    "hf": (lambda model, recipe, output: hf.plan(model, recipe, output), "", transformers.WORKER, ("native", "custom")),
    "gguf": (
        lambda model, recipe, output: gguf.plan(model, recipe, output, gguf.Options(type="f32")),
        ".gguf",
        llama_cpp.WORKER,
        ("llama.cpp",),
    ),
    "onnx": (
        lambda model, recipe, output: onnx.plan(model, recipe, output),
        "",
        onnxruntime.WORKER,
        ("onnxruntime",),
    ),
}


class Quick(Options):
    """Every length in 512 tokens, nothing decoded."""

    @property
    def budget(self) -> Budget:
        return Budget(dense=SPREAD_TOKENS, decode=0)


@dataclass(frozen=True)
class Published:
    """A set as a model's config has it."""

    name: str
    config: dict[str, Any]


def published(folders: list[Path]) -> Iterator[Published]:
    """Every set of a family that is converted, as a config."""
    paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    values = {path.stem: json.loads(path.read_text()) for path in paths}
    for name, found in values.items():
        if name.startswith("phi-") and not {"moe", "vision"} & set(name.split("-")):  # those are other families
            yield Published(name, config_of("phi3", found, found["short_factor"], found["long_factor"]))
        elif (match := TABLE.fullmatch(name)) and found["long_factor"]:
            family = match[1].removesuffix("2")
            # The table that is named after a length alone is for sequences of that length.
            short = values[f"longrope-{match[1]}-7b-4k-{match[3]}"]["short_factor"]
            yield Published(name, config_of(family, found, short, found["long_factor"]))


def config_of(family: str, found: dict[str, Any], short: list[float], long: list[float]) -> dict[str, Any]:
    rotated = found["rotary_dim"] / found["head_dim"]
    return {
        "model_type": family,
        "architectures": [CLASSES[family]],
        **SMALL,
        "hidden_size": SMALL["num_attention_heads"] * found["head_dim"],
        "head_dim": found["head_dim"],
        **({"partial_rotary_factor": rotated} if rotated < 1 else {}),
        "max_position_embeddings": found["target_length"] or found["max_position_embeddings"],
        "original_max_position_embeddings": found["original_max_position_embeddings"],
        "rope_theta": found["rope_theta"],
        "sliding_window": None,
        "rope_scaling": {
            ("type" if family == "phi3" else "rope_type"): "longrope",
            "short_factor": short,
            "long_factor": long,
        },
    }


def measured(task: tuple[Published, float, str, Path]) -> dict[str, Any]:
    """The row of one set in one format."""
    one, widen, kind, scratch = task
    folder = scratch / f"{one.name}-{widen:g}-{kind}"
    write_random(folder / "model", one.config, widen=widen)
    model = open_model(str(folder / "model"))
    recipe, _ = own_recipe(model)
    _, _, worker, codes = FORMATS[kind]
    interpreter = Interpreter(worker)
    options, quick = (made(threads=1, interpreter=interpreter) for made in (Options, Quick))
    artifact = baked(kind, model, recipe, folder / f"{kind}-right")
    report = parity.verify(artifact, target_of(artifact), options=options)
    mutants = {name: caught(kind, model, recipe, name, folder, quick) for name in (*RECIPE_MUTANTS, "unpermuted")}
    interpreter.close()
    shutil.rmtree(folder)
    print(kind, one.name, f"x{widen:g}", "passed" if report.passed else report.summary, flush=True)
    return {
        "set": one.name,
        "window": recipe.tiers[-1].max_length,
        "head size": model.shape.head_dim,
        "widened": widen,
        "format": kind,
        "passed": report.passed,
        "summary": report.summary,
        "cases": [case_of(row) for row in report.rows if row.code in codes],
        "caught": {name: found for name, found in mutants.items() if found is not None},
    }


def case_of(row: parity.Row) -> dict[str, Any]:
    kept = ("code", "case", "length", "verdict", "kl_mean", "kl_max", "bound", "noise")
    return {key: value for key in kept if (value := getattr(row, key)) is not None}


def baked(kind: str, model: Model, recipe: Recipe, output: Path) -> Path:
    plan, suffix, _, _ = FORMATS[kind]
    output = output.with_name(output.name + suffix)
    bake(plan(model, recipe, output))
    return output


def caught(
    kind: str, model: Model, right: Recipe, mutant: str, folder: Path, options: Options
) -> dict[str, float] | None:
    """What failed for an artifact with a mistake, and how many bounds away it is (0: not by its logits). None where
    the mistake does not exist for this recipe."""
    wrong = right if mutant == "unpermuted" else RECIPE_MUTANTS[mutant](right)
    if wrong is None:
        return None
    source = unpermuted_qk(model) if mutant == "unpermuted" else model
    artifact = baked(kind, source, wrong, folder / f"{kind}-{mutant.replace(' ', '-')}")
    against = {"against": model.reference, "recipe": right}
    report = parity.verify(artifact, target_of(artifact), options=options, **against)
    return bounds_away(report)


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| set | window | head | q, k | format | verdict | most of a bound | far end: KL, noise | mistakes caught |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        judged = [case for case in row["cases"] if case.get("bound")]
        closest = max(judged, key=lambda case: case["kl_mean"] / case["bound"])
        far = max((case for case in judged if case["case"] == "far end"), key=lambda case: case["kl_mean"])
        share = f"{closest['kl_mean'] / closest['bound']:.2f} ({closest['code']}, {closest['case']})"
        predicted = f", {far['noise']:.1e}" if "noise" in far else ""
        all_of, found = len(row["caught"]), sum(bool(each) for each in row["caught"].values())
        cells = (
            row["set"],
            row["window"],
            row["head size"],
            f"x{row['widened']:g}",
            row["format"],
            "passed" if row["passed"] else "FAILED",
            share,
            f"{far['kl_mean']:.1e}{predicted}",
            f"{found} of {all_of}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("factors", type=Path, nargs="+")
    parser.add_argument("--only", nargs="*", help="names of sets; default: all")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--widen", nargs="*", type=float, default=[3.0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--print", action="store_true", help="keep no result")
    parser.add_argument("--add", action="store_true", help="to the rows of an earlier result")
    options = parser.parse_args()
    sets = [one for one in published(options.factors) if not options.only or one.name in options.only]
    with scratch_folder(options.scratch) as scratch:
        tasks = [(one, widen, kind, scratch) for one in sets for widen in options.widen for kind in options.formats]
        with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
            rows = list(pool.imap(measured, tasks))
    print("\n".join(table(rows)))
    passed, caught = sum(row["passed"] for row in rows), [bool(hit) for row in rows for hit in row["caught"].values()]
    report(
        Figure("published sets that pass verify", passed, f"of {len(rows)}", limit=len(rows), least=True),
        Figure("mistakes in them that are caught", sum(caught), f"of {len(caught)}", limit=len(caught), least=True),
    )
    if options.print:
        return
    if options.add:
        key = itemgetter("set", "widened", "format")
        earlier = json.loads((RESULTS / f"{NAME}.json").read_text())["rows"]
        rows = [row for row in earlier if key(row) not in set(map(key, rows))] + rows
    lines = table(rows)
    result = json.loads(save(NAME, {"rows": rows}).read_text())
    versions = ", ".join(f"{name} {number}" for name, number in {**result["versions"], **engines()}.items())
    head = [
        f"Published LongRoPE sets, baked from the model's own rotation and verified. {result['date']}, {versions}.",
        f"Command: `{result['command']}`. KL in nats, mean; a small random model of each family, q and k widened.",
        "",
    ]
    (RESULTS / f"{NAME}.md").write_text("\n".join([*head, *lines]) + "\n")


def engines() -> dict[str, str]:
    """Versions of what ran the artifacts."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "onnxruntime", "xllamacpp")}


if __name__ == "__main__":
    main()
