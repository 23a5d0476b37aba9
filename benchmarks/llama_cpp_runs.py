# SPDX-License-Identifier: Apache-2.0
"""What GGUF files with a recipe do in llama.cpp, beyond the original window and within it.

    python benchmarks/llama_cpp_runs.py [MODEL] [--name NAME] [--text FILE] [--attention-factor F] [--types q8_0 q4_k_m]
        [--within N] [--beyond N …] [--complete N] [--text-types q8_0 …] [--passkey N …] [--passkey-types q8_0 …]
        [--trials 10] [--windows 16] [--only text …] [--threads N] [--scratch DIR]

MODEL (default: demo) gets a uniform YaRN recipe of 8x by `lrconvert recipe derive`, and files of every type by
`lrconvert gguf`. FILE is a long text that the model can read (demo brings its own). Measured:

1. text: a completion at N tokens, and the perplexity of the same last 512 tokens with more and more text before them,
   in the file and in the same file without factors and keys, which is what llama.cpp's own converter writes;
2. passkeys: the same documents in llama.cpp and in transformers, on the `lrconvert hf` artifact of the same recipe;
3. the price of a set that is chosen once a context: perplexity of the last 256 tokens of windows of 1,024 in a context
   that gets the short set and in one that gets the long set; passkeys of 2,048 tokens in both;
4. a context shift: what moving the kept tokens changes, with the attention factor in the file and folded into q and k.

llama.cpp runs on the CPU with its default cache (f16). What was measured is kept in `--scratch` and not measured again.
`results/llama-cpp-runs.md` is written from the results of all models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, Figure, lrconvert, report, run, save, scratch_folder
from _llama_cpp_tables import DROPPED, JUDGED, MORE, READ, SECTIONS, WINDOW, WINDOW_JUDGED, markdown
from tokenizers import Tokenizer

from lrconvert.checkpoint import locate, open_model
from lrconvert.checkpoint.gguf_header import read_header
from lrconvert.evals.passkey import PasskeyFormat, passkey_accuracy
from lrconvert.evals.perplexity import same_token_perplexity
from lrconvert.parity.measures import compare
from lrconvert.recipe import load_recipe
from lrconvert.runtimes import llama_cpp, transformers
from lrconvert.runtimes.base import Scores, Session, score_by_logits, scores_of
from lrconvert.runtimes.llama_cpp import LlamaSession
from lrconvert.targets.gguf.layout import Planned, Raw, header_of, padding

FACTOR = 8
NEW_TOKENS, WORDS = 48, 15
SHORT_PASSKEY = 2048
STEP = 256  # llama.cpp makes contexts in multiples of it
PLAIN = "-plain"  # behind a type: the file without factors


@dataclass(frozen=True)
class Measured:
    """Numbers that were measured once, in a file: a benchmark of an hour may be interrupted."""

    path: Path

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        if key not in known:
            known[key] = measure()
            self.path.write_text(json.dumps(known, indent=1))
            print(f"{key}: {json.dumps(known[key])[:300]}", flush=True)
        return known[key]


class Subject:
    """A model, its recipe, and the files made of it."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.source, self.folder, self.threads = arguments.model, folder, arguments.threads
        self.attention = arguments.attention_factor
        model = open_model(self.source)
        self.window = model.shape.window
        side = model.checkpoint.side_files()["tokenizer.json"]
        self.tokenizer = Tokenizer.from_str((side.read_bytes() if isinstance(side, Path) else side).decode())
        demo = locate("demo")
        # Digits are tokens of their own, and every piece begins with a space: they read the same alone and joined.
        self.passkey = PasskeyFormat.read(demo / "passkey.json")
        if self.source != "demo":
            needle = " The pass key is {key}. Remember it. {key} is the pass key."
            self.passkey = replace(self.passkey, needle=needle)
        text = (arguments.text or demo / "heldout.txt").read_text(encoding="utf-8")
        start = 0 if arguments.text is None else text.index("\n\n", len(text) // 2) + 2  # no table of contents
        self.text = self.encode(text[start : start + 400_000])

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def recipe(self) -> Path:
        options = ["--method", "yarn", "--factor", str(FACTOR), "--uniform"]
        if self.attention is not None:
            options += ["--attention-factor", str(self.attention)]
        return self._made("recipe", lambda to: lrconvert("recipe", "derive", self.source, *options, "-o", to))

    def gguf(self, kind: str, *options: str) -> Path:
        def command(to: Path) -> list[str | Path]:
            return lrconvert("gguf", self.source, "--recipe", self.recipe, "--type", kind, *options, "-o", to)

        return self._made(f"{kind}{''.join(options)}.gguf", command)

    def without_factors(self, kind: str) -> Path:
        """The same weights, no factors and no keys of a scaling."""
        output = self.folder / f"{kind}{PLAIN}.gguf"
        if not output.exists():
            _strip(self.gguf(kind), output)
        return output

    @cached_property
    def hf(self) -> Path:
        return self._made("hf", lambda to: lrconvert("hf", self.source, "--recipe", self.recipe, "-o", to))

    def _made(self, name: str, command: Callable[[Path], list[str | Path]]) -> Path:
        output = self.folder / name
        if not output.exists():
            run(command(output))
        return output

    @contextmanager
    def llama(self, file: Path) -> Iterator[LlamaSession]:
        with llama_cpp.open_session(file, kv="f16", threads=self.threads) as session:
            yield session


def _strip(source: Path, output: Path) -> None:
    header = read_header(source)
    keys: dict[str, Any] = {key: Raw(header.raw(key)) for key in header.metadata if ".rope.scaling." not in key}
    tensors = [tensor for tensor in header.tensors.values() if not tensor.name.startswith("rope_factors")]
    data = source.read_bytes()
    with output.open("wb") as file:
        file.write(header_of(keys, [Planned(tensor.name, tensor.type, tensor.shape) for tensor in tensors]))
        for tensor in tensors:
            file.write(data[tensor.offset : tensor.offset + tensor.nbytes] + bytes(padding(tensor.nbytes)))


class InContext:
    """A session of llama.cpp whose contexts have a size of their own, whatever the length of a prompt."""

    answers: frozenset[str] = frozenset()

    def __init__(self, session: LlamaSession, context: int) -> None:
        self._session, self._context, self.info = session, context, session.info

    def logits(
        self, rows: Sequence[Sequence[int]], *, positions: Sequence[int] | None = None, keep: Sequence[int]
    ) -> list[np.ndarray]:
        return self._session.logits(rows, positions=positions, keep=keep, context=self._context)

    def score(self, rows: Sequence[Sequence[int]], judged: Sequence[int]) -> list[Scores]:
        return score_by_logits(self, rows, judged)

    def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], np.ndarray]:
        return self._session.generate(prompt, new_tokens, context=self._context)

    def close(self) -> None: ...


# --- what is measured ------------------------------------------------------------------------------------


def text_runs(
    subject: Subject,
    types: Sequence[str],
    judged: Sequence[str],
    lengths: Sequence[int],
    complete: int,
    measured: Measured,
) -> list[Any]:
    """A completion beyond the window in every type; in those of `judged`, perplexity at all lengths, with and without
    factors."""
    rows, tokens = [], subject.text[: max(lengths)]
    for kind in types:
        for file, factors in ((subject.gguf(kind), True), (subject.without_factors(kind), False)):
            with subject.llama(file) as session:
                for length in lengths if kind in judged else ():
                    key = f"text {kind} {length} {'with' if factors else 'without'} factors"
                    found = measured.once(
                        key, lambda s=session, n=length: round(same_token_perplexity(s, tokens, n, JUDGED), 2)
                    )
                    used = "none" if not factors else "short" if length <= subject.window else "long"
                    rows.append({"type": kind, "tokens": length, "set": used, "perplexity": found})
                if factors:
                    written = measured.once(f"completion {kind}", lambda s=session: _complete(subject, s, complete))
                    rows.append({"type": kind, **written})
    return rows


def _complete(subject: Subject, session: LlamaSession, length: int) -> dict[str, Any]:
    prompt = subject.text[:length]
    new, _ = session.generate(prompt, NEW_TOKENS)
    end = " ".join(subject.tokenizer.decode(prompt[-8 * WORDS :]).split()[-WORDS:])
    return {"prompt_tokens": length, "prompt_ends": end, "completion": subject.tokenizer.decode(new)}


def passkey_runs(
    subject: Subject, types: Sequence[str], lengths: Sequence[int], trials: int, measured: Measured
) -> list[Any]:
    """Which trials are right, in every file and in transformers."""
    rows = []
    for length in lengths:
        for kind in types:
            plain = kind.endswith(PLAIN)
            file = subject.without_factors(kind.removesuffix(PLAIN)) if plain else subject.gguf(kind)
            with subject.llama(file) as session:
                right = _trials(subject, session, f"passkey {kind} {length}", length, trials, measured)
            name = f"llama.cpp, {kind.removesuffix(PLAIN)}{' without factors' if plain else ''}"
            rows.append({"runtime": name, "tokens": length, "right": right})
        with transformers.open_session(subject.hf, custom=True, threads=subject.threads) as session:
            right = _trials(subject, session, f"passkey transformers {length}", length, trials, measured)
        rows.append({"runtime": "transformers, float32", "tokens": length, "right": right})
    return rows


def _trials(subject: Subject, session: Session, name: str, length: int, trials: int, measured: Measured) -> list[bool]:
    depths = [(trial + 0.5) / trials for trial in range(trials)]

    def one(trial: int) -> bool:
        return passkey_accuracy(session, subject.passkey, subject.encode, length, depths[trial : trial + 1], trial) == 1

    return [measured.once(f"{name} {trial + 1}/{trials}", lambda t=trial: one(t)) for trial in range(trials)]


def price_runs(subject: Subject, types: Sequence[str], windows: int, trials: int, measured: Measured) -> list[Any]:
    """Short prompts with the short set and with the long set: only the size of the context differs."""
    rows = []
    starts = np.linspace(0, len(subject.text) - WINDOW, windows).astype(int)
    for kind in types:
        found: dict[str, np.ndarray] = {}
        cases = (
            ("none", subject.without_factors(kind), WINDOW),
            ("short", subject.gguf(kind), WINDOW),
            ("long", subject.gguf(kind), subject.window + STEP),
        )
        for used, file, context in cases:
            with subject.llama(file) as session:
                inside = InContext(session, context)
                values = []
                for start in starts.tolist():
                    key = f"price {kind} {used} {start}"
                    values.append(measured.once(key, lambda s=inside, at=start: _window_loss(subject, s, at)))
                found[used] = np.array(values)
                row = {"type": kind, "set": used, "context": context, **_summary(found[used])}
                if used != "none":
                    more = found[used] - found["none"]
                    row["more_nats_than_none"] = [round(more.mean(), 4), round(_error(more), 4)]
                if used == "long":
                    more = found["long"] - found["short"]
                    row["more_nats_than_short"] = [round(more.mean(), 4), round(_error(more), 4)]
                if subject.source == "demo":
                    inside = InContext(session, max(context, SHORT_PASSKEY))
                    row["passkey_2048"] = _trials(
                        subject, inside, f"short passkey {kind} {used}", SHORT_PASSKEY, trials, measured
                    )
                rows.append(row)
    return rows


def _window_loss(subject: Subject, session: Session, start: int) -> float:
    """Mean loss of the last tokens of a window, nats."""
    window = np.array(subject.text[start : start + WINDOW])
    keep = list(range(WINDOW - WINDOW_JUDGED - 1, WINDOW - 1))
    (logits,) = session.logits([window.tolist()], keep=keep)
    return round(float(scores_of(logits, window[-WINDOW_JUDGED:]).losses.mean()), 5)


def _summary(values: np.ndarray) -> dict[str, Any]:
    return {
        "nats": [round(values.mean(), 4), round(_error(values), 4)],
        "perplexity": round(float(np.exp(values.mean())), 2),
    }


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def shift_runs(subject: Subject, kind: str, measured: Measured) -> list[Any]:
    """KL of the logits after a context shift from those of the same tokens left where they are: distances are the
    same, so anything above rounding is wrong."""
    rows = []
    for name, options in (("in the file", ()), ("folded into q and k", ("--fold-attention-factor",))):
        file = subject.gguf(kind, *options)
        mean, largest, changed = measured.once(f"shift {kind} {name}", lambda f=file: _shift(subject, f))
        rows.append({"type": kind, "attention_factor": name, "kl_mean": mean, "kl_max": largest, "more_nats": changed})
    return rows


def _shift(subject: Subject, file: Path) -> list[float]:
    """Mean and largest KL, and how much more the true tokens cost."""
    tokens, more = subject.text[:READ], subject.text[READ : READ + MORE]
    context = subject.window + STEP
    with subject.llama(file) as session:
        still = session.shifted(tokens, DROPPED, more, context=context, move=False)
        moved = session.shifted(tokens, DROPPED, more, context=context)
    found, targets = compare(still, moved), np.array(more[1:])
    changed = scores_of(moved[:-1], targets).losses.mean() - scores_of(still[:-1], targets).losses.mean()
    return [float(f"{found.kl_mean:.2e}"), float(f"{found.kl_max:.2e}"), round(float(changed), 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--name", help="what the result calls the model; default: its name")
    parser.add_argument("--text", type=Path, help="a long text; default: the embedded model's")
    parser.add_argument("--attention-factor", type=float, help="of the recipe; default: YaRN's own")
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_k_m"])
    parser.add_argument("--beyond", nargs="+", type=int, default=[6144, 8192, 16384], help="lengths for text")
    parser.add_argument("--within", type=int, help="a length for text within the window; default: the window")
    parser.add_argument("--complete", type=int, help="tokens before the completion; default: the first of --beyond")
    parser.add_argument("--passkey", nargs="*", type=int, default=[6144, 8192], help="lengths for passkeys")
    parser.add_argument(
        "--passkey-types", nargs="+", help="types for passkeys, q8_0-plain: without factors; default: all"
    )
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--text-types", nargs="+", help="types for perplexity of text; default: all")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--scratch", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    with scratch_folder(arguments.scratch) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        measure(arguments, folder)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    subject, measured = Subject(arguments, folder), Measured(folder / "measured.json")
    types, trials = arguments.types, arguments.trials
    name = arguments.name or Path(arguments.model).stem
    with subject.llama(subject.gguf(types[0])) as session:
        llama = session.info["llama.cpp"]
    lengths = (arguments.within or subject.window, *arguments.beyond)
    complete = arguments.complete or arguments.beyond[0]
    sections = {
        "price": lambda: price_runs(subject, types, arguments.windows, trials, measured),
        "shift": lambda: [row for kind in types for row in shift_runs(subject, kind, measured)],
        "text": lambda: text_runs(subject, types, arguments.text_types or types, lengths, complete, measured),
        "passkey": lambda: passkey_runs(subject, arguments.passkey_types or types, arguments.passkey, trials, measured),
    }
    found = {section: run_section() for section, run_section in sections.items() if section in arguments.only}
    numbers = {
        "model": name,
        "libraries": {"llama.cpp": llama, **{what: version(what) for what in ("torch", "transformers", "tokenizers")}},
        "original_window": subject.window,
        "window": FACTOR * subject.window,
        "attention_factor": load_recipe(subject.recipe).tiers[-1].attention_factor,
        "text_file": arguments.text.name if arguments.text else "heldout.txt of the embedded model",
        "windows": arguments.windows,
        "tensors": {kind: _types(subject.gguf(kind)) for kind in types},
        **found,
    }
    right = {row["runtime"]: 0 for row in found.get("passkey", ())}
    for row in found.get("passkey", ()):
        right[row["runtime"]] += sum(row["right"])
    peer = right.popitem() if right else ("", 0)
    unit = f"of {trials * len(arguments.passkey)}"
    report(*(Figure(f"passkeys in {runtime}", count, unit, *peer) for runtime, count in right.items()))
    save(f"llama-cpp-runs-{name}".lower(), numbers)
    every = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("llama-cpp-runs-*.json"))]
    (RESULTS / "llama-cpp-runs.md").write_text(markdown(every))


def _types(file: Path) -> str:
    kinds = [tensor.type.name for tensor in read_header(file).tensors.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))


if __name__ == "__main__":
    main()
