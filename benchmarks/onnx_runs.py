# SPDX-License-Identifier: Apache-2.0
"""What ONNX folders do beyond the original window, beside the Hugging Face folder of the same recipe in transformers.

    python benchmarks/onnx_runs.py [MODEL] [--name NAME] [--recipe R] [--text FILE] [--device cpu|cuda] [--dtype f32 …]
        [--lengths N …] [--trials 10] [--needle SENTENCE] [--scratch DIR]

MODEL (default: demo, with its shipped recipe) is baked by `lrconvert onnx` in every dtype, and by `lrconvert hf`, which
transformers runs with the folder's own code. Measured in both, on the same documents:

1. passkeys: `trials` documents of every length, the key at as many depths;
2. perplexity of the same last 512 tokens of a text, with more and more text before them;
3. greedy tokens across the original window, the sequence read anew there and with its cache.

On a GPU transformers computes in bfloat16, or float32 beside f32. `results/onnx-runs.md` has the rows of all models.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, Figure, lrconvert, report, run, scratch_folder

from lrconvert.checkpoint import locate, open_model
from lrconvert.checkpoint.tokenizer import tokenizer_of
from lrconvert.evals.passkey import PasskeyFormat, measure_passkey
from lrconvert.evals.perplexity import same_token_perplexity
from lrconvert.parity.options import Options, chosen_backends

JUDGED, NEW, BEFORE = 512, 24, 6
# The embedded model knows this form; others are asked in plain English, with the key where they know digits best.
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--name")
    parser.add_argument("--recipe", default="demo-yarn-8x")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["f32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 16384])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    name = arguments.name or arguments.model
    path = RESULTS / "onnx-runs.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    with scratch_folder(arguments.scratch) as folder:
        for dtype in arguments.dtype:
            key = f"{name}, {dtype}, {arguments.device}"
            known[key] = {"date": date.today().isoformat(), **measure(arguments, folder, dtype)}
            path.write_text(json.dumps(known, indent=1) + "\n")
            keys = {runtime: known[key][f"passkeys, {runtime}"] for runtime in ("onnxruntime", "transformers")}
            ours, theirs = (sum(found.values()) for found in keys.values())
            unit = f"of {arguments.trials * len(arguments.lengths)}"
            report(Figure(f"passkeys in ONNX Runtime, {dtype}", ours, unit, "transformers", theirs))
            print(key, json.dumps(known[key])[:600], flush=True)
    (RESULTS / "onnx-runs.md").write_text(table(known))


def measure(arguments: argparse.Namespace, folder: Path, dtype: str) -> dict[str, Any]:
    hf, onnx = folder / "hf", folder / f"onnx-{dtype}"
    attention = "standard" if arguments.device != "cpu" and dtype == "f32" else "gqa"
    if not hf.exists():
        run(lrconvert("hf", arguments.model, "--recipe", arguments.recipe, "-o", hf))
    if not onnx.exists():
        run(lrconvert("onnx", arguments.model, "--recipe", arguments.recipe, "--dtype", dtype, "--attention", attention,
                      "-o", onnx))  # fmt: skip
    encode, form, text = tokenizer_of(hf), passkey_form(arguments.model), text_of(arguments)
    window, exact = open_model(arguments.model).shape.window, dtype == "f32" or arguments.device == "cpu"
    options = Options(device=arguments.device, dtype="float32" if exact else "bfloat16")
    result: dict[str, Any] = {"attention": attention, "versions": {}}
    with ExitStack() as stack:
        sessions: dict[str, Any] = {
            "onnxruntime": stack.enter_context(closing(chosen_backends(onnx, "onnx", options)[-1].open(onnx, options))),
            "transformers": stack.enter_context(closing(chosen_backends(hf, "hf", options)[-1].open(hf, options))),
        }
        for runtime, session in sessions.items():
            result["versions"] |= {key: value for key, value in session.info.items() if key not in ("class", "dtype")}
            rows = measure_passkey(session, form, encode, arguments.lengths, depths=arguments.trials)
            result[f"passkeys, {runtime}"] = {
                length: sum(row.hits for row in rows if row.length == length) for length in arguments.lengths
            }
            tokens = encode(text)
            result[f"perplexity, {runtime}"] = {
                length: round(same_token_perplexity(session, tokens[: max(arguments.lengths)], length, JUDGED), 3)
                for length in arguments.lengths
            }
            prompt = tokens[: window - BEFORE]
            result[f"tokens, {runtime}"] = session.generate(prompt, NEW)[0]
            if "cached" in session.answers:
                result["tokens, cached keys"] = session.generate(prompt, NEW, policy="cached")[0]
    result["trials"] = arguments.trials
    return result


def passkey_form(model: str) -> PasskeyFormat:
    form = PasskeyFormat.read(locate("demo") / "passkey.json")
    return form if model == "demo" else replace(form, needle=NEEDLE)


def text_of(arguments: argparse.Namespace) -> str:
    text = (arguments.text or locate("demo") / "heldout.txt").read_text(encoding="utf-8")
    start = 0 if arguments.text is None else text.index("\n\n", len(text) // 2) + 2  # no table of contents
    return text[start : start + 400_000]


def table(known: dict[str, Any]) -> str:
    lines = [
        "# ONNX folders beyond the original window",
        "",
        "Command: `python benchmarks/onnx_runs.py MODEL …`, for SmolLM2 with the recipe `search/smollm2-64k` beside "
        "this file and Moby Dick as its text. Keys found, of the same documents; perplexity of the same "
        f"last {JUDGED} tokens; whether {NEW} greedy tokens across the original window are transformers' own.",
        "",
        "| model | tokens | passkeys, ORT | transformers | of | perplexity, ORT | transformers |",
        "|" + " --- |" * 7,
    ]
    after = []
    for name, found in sorted(known.items()):
        for length in found["passkeys, onnxruntime"]:
            cells = [found[f"{what}, {runtime}"][length] for what in ("passkeys", "perplexity")
                     for runtime in ("onnxruntime", "transformers")]  # fmt: skip
            lines.append(
                f"| {name} | {length} | {cells[0]} | {cells[1]} | {found['trials']} | {cells[2]} | {cells[3]} |"
            )
        own, cached, right = (found[f"tokens, {what}"] for what in ("onnxruntime", "cached keys", "transformers"))
        alike = {what: int(np.sum(np.array(tokens) == np.array(right))) for what, tokens in
                 (("read anew", own), ("cached keys", cached))}  # fmt: skip
        versions = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
        after.append(
            f"- {name} ({found['date']}, {versions}): {alike['read anew']} of {NEW} tokens as transformers' when the "
            f"sequence is read anew, {alike['cached keys']} with cached keys."
        )
    return "\n".join([*lines, "", *after]) + "\n"


if __name__ == "__main__":
    main()
