# SPDX-License-Identifier: Apache-2.0
"""One exported folder, unchanged, in the programs that people run ONNX with: the same greedy tokens in each.

ONNX Runtime itself is asked twice, by a user's own loop and by lrconvert's runtime. Other programs live in environments
of their own, which variables name; without them their tests skip:

    LRCONVERT_GENAI_PYTHON, LRCONVERT_OPTIMUM_PYTHON   an interpreter with onnxruntime-genai, with optimum-onnx
    LRCONVERT_NODE_MODULES                             a folder that holds node_modules with @huggingface/transformers,
                                                       and playwright-core for the page in a browser
    LRCONVERT_SCREENSHOTS                              where the page's pictures are kept; default: a temporary folder

The page needs `chromium` on the PATH. Versions that ran are properties of the test report.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import recipe_for
from support.pico import FAMILIES
from support.snippets import short_demo
from tokenizers import Tokenizer

from lrconvert.checkpoint import Model, locate, open_model
from lrconvert.cli import run
from lrconvert.parity.mutants import RECIPE_MUTANTS
from lrconvert.recipe import Recipe, load_recipe, write_recipe

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.onnxruntime import WORKER, Policy, open_session

HERE = Path(__file__).parent
WEB = HERE.parents[1] / "examples" / "web"
NEW = 20
Record = Callable[[str, object], None]
ATTENTIONS = ("gqa", "standard")
# Their pico models have a cache whose shape optimum-onnx 0.1.0 misreads: grouped heads, heads of their own width.
MISREAD_BY_OPTIMUM = frozenset({"phi3", "qwen3"})


# --- what is exported -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model, its recipe, and prompts: within the original window, growing past it, past it from the start."""

    model: Model
    recipe: Recipe
    prompts: dict[str, list[int]]

    @property
    def boundary(self) -> int:
        return self.recipe.tiers[0].max_length


# Of prompts, where those of the usual seed end early or go on alike with the sets exchanged.
SEEDS = {"glm4": 14, "olmo3": 12}


def pico_subject(model: Model) -> Subject:
    rng = np.random.default_rng(SEEDS.get(model.family.name, 11))
    lengths = {"below": 30, "crossing": 54, "beyond": 90}
    prompts = {name: rng.integers(3, model.shape.vocab, length).tolist() for name, length in lengths.items()}
    return Subject(model, recipe_for(model), prompts)


@functools.cache
def demo_subject() -> Subject:
    """Its text holds no digits and begins pieces with a space: decoded and read again, it has the same tokens."""
    tokens = demo_tokenizer().encode(demo_text(), add_special_tokens=False).ids
    prompts = {"below": tokens[:60], "crossing": tokens[1000:5090], "beyond": tokens[2000:6200]}
    return Subject(open_model("demo"), load_recipe("demo-yarn-8x"), prompts)


@pytest.fixture(scope="module")
def short_subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The same model with a window of 256 tokens."""
    model = open_model(short_demo(tmp_path_factory.mktemp("demo") / "short-demo", window=256))
    tokens = demo_subject().prompts["crossing"]
    return Subject(model, recipe_for(model), {"below": tokens[:60], "crossing": tokens[:250]})


def demo_text() -> str:
    return (locate("demo") / "heldout.txt").read_text(encoding="utf-8")


@functools.cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(locate("demo") / "tokenizer.json"))


Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`lrconvert onnx` with these options, once for each set of arguments."""
    made: dict[object, Path] = {}

    def get(subject: Subject, *options: str, recipe: Recipe | None = None) -> Path:
        source, used = subject.model.reference, recipe or subject.recipe
        key = (source, options, used.tiers)
        if key not in made:
            folder = tmp_path_factory.mktemp("exported")
            path = write_recipe(used, folder / "recipe")
            asked = ["onnx", str(source), "--recipe", str(path), "-o", str(folder / "onnx-folder"), *options]
            assert run(asked) == 0
            made[key] = folder / "onnx-folder"
        return made[key]

    return get


# --- who reads it ---------------------------------------------------------------------------------------------------


def answer(command: Sequence[str | Path], request: dict[str, Any]) -> dict[str, Any]:
    """What a script beside this file says to a request; fails with its last words."""
    done = attempt(command, request)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def attempt(command: Sequence[str | Path], request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)


def named(variable: str, what: str) -> str:
    if not (found := os.environ.get(variable)):
        pytest.skip(f"{variable} names no {what}")
    return found


def command_of(consumer: str) -> list[str | Path]:
    """How a consumer is started, or its test is skipped."""
    if consumer == "onnxruntime":
        return [sys.executable, "-I", HERE / "run_onnxruntime.py"]
    if consumer == "transformers_js":
        return ["node", HERE / "run_transformers_js.mjs", node_modules()]
    python = named(f"LRCONVERT_{consumer.upper()}_PYTHON", f"interpreter with {consumer}")
    return [python, "-I", HERE / f"run_{consumer}.py"]


def node_modules() -> str:
    if shutil.which("node") is None:
        pytest.skip("there is no node on the PATH")
    return named("LRCONVERT_NODE_MODULES", "folder that holds node_modules")


CONSUMERS = [
    pytest.param("onnxruntime"),
    pytest.param("genai", marks=pytest.mark.genai),
    pytest.param("optimum", marks=pytest.mark.optimum),
    pytest.param("transformers_js", marks=pytest.mark.node),
]


def tokens_in(
    consumer: str, folder: Path, prompts: Sequence[list[int]], record: Record, **options: bool
) -> list[list[int]]:
    asked = {"folder": str(folder), "prompts": list(prompts), "new_tokens": NEW, **options}
    found = answer(command_of(consumer), asked)
    for name, version in found["versions"].items():
        record(name, version)
    return found["tokens"]


Ours = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def ours() -> Iterator[Ours]:
    """The same by lrconvert's runtime, which says what policy it follows; for some of the prompts, or all."""
    interpreter = Interpreter(WORKER)

    def tokens(subject: Subject, folder: Path, policy: Policy, *names: str) -> list[list[int]]:
        fused = "GroupQueryAttention" in (folder / "onnx" / "model.onnx").read_bytes().decode("latin-1")
        boundaries = [tier.max_length for tier in subject.recipe.tiers[:-1]]
        heads = subject.model.shape.heads
        with open_session(
            folder, boundaries=boundaries, heads=heads, fused=fused, threads=1, interpreter=interpreter
        ) as session:
            chosen = [subject.prompts[name] for name in names or subject.prompts]
            return [session.generate(prompt, NEW, policy=policy)[0] for prompt in chosen]

    yield tokens
    interpreter.close()


def until_end(subject: Subject, tokens: list[int]) -> list[int]:
    """Up to the end of the text, where every program but a bare loop stops."""
    ends = subject.model.checkpoint.config["eos_token_id"]
    return tokens[: tokens.index(ends) + 1] if ends in tokens else tokens


# --- the same tokens everywhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_every_family_continues_alike(
    pico: Callable[..., Model],
    export: Export,
    ours: Ours,
    record_property: Record,
    consumer: str,
    family: str,
    attention: str,
) -> None:
    """Before, across and beyond the boundary, with the cache going on, a program's tokens are those of our runtime."""
    subject = pico_subject(pico(family))
    folder = export(subject, "--attention", attention)
    mended = {"mended": True} if consumer == "optimum" and family in MISREAD_BY_OPTIMUM else {}
    found = tokens_in(consumer, folder, list(subject.prompts.values()), record_property, **mended)
    expected = ours(subject, folder, "cached")
    assert [until_end(subject, row) for row in found] == [until_end(subject, row) for row in expected]
    reached = dict(zip(subject.prompts, (until_end(subject, row) for row in expected), strict=True))["crossing"]
    assert len(subject.prompts["crossing"]) + len(reached) > subject.boundary + 2


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_the_embedded_model_continues_alike(
    export: Export, ours: Ours, record_property: Record, consumer: str, attention: str
) -> None:
    """A trained model with a real window: 4090 tokens and 20 new ones cross it."""
    subject = demo_subject()
    folder = export(subject, "--attention", attention)
    found = tokens_in(consumer, folder, list(subject.prompts.values()), record_property)
    assert found == ours(subject, folder, "cached")


@pytest.mark.parametrize("dtype", ["f16", "int8", "int4"])
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_other_types_continue_alike(
    export: Export, ours: Ours, short_subject: Subject, record_property: Record, consumer: str, dtype: str
) -> None:
    """Caches in f16, and weights in 8 and 4 bits, are read everywhere as our runtime reads them, before and across the
    boundary."""
    folder = export(short_subject, "--dtype", dtype)
    found = tokens_in(consumer, folder, list(short_subject.prompts.values()), record_property)
    assert found == ours(short_subject, folder, "cached")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompts_can_tell(pico: Callable[..., Model], export: Export, ours: Ours, family: str) -> None:
    """A graph with the sets exchanged continues every prompt in another way, so equal tokens mean something."""
    subject = pico_subject(pico(family))
    wrong = RECIPE_MUTANTS["swapped sets"](subject.recipe)
    assert wrong is not None
    right = ours(subject, export(subject), "cached")
    mistaken = ours(subject, export(subject, recipe=wrong), "cached")
    assert all(one != other for one, other in zip(right, mistaken, strict=True))


# --- batches --------------------------------------------------------------------------------------------------------


def batches(subject: Subject) -> dict[str, list[list[int]]]:
    """Rows of unequal length, below and beyond the boundary, and one of each."""
    below, beyond = subject.prompts["below"], subject.prompts["beyond"]
    return {"below": [below, below[9:]], "beyond": [beyond, beyond[13:]], "mixed": [below, beyond, below[20:]]}


@pytest.mark.optimum
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", ["below", "beyond", "mixed"])
def test_a_batch_padded_on_the_left_continues_as_its_rows(
    pico: Callable[..., Model], export: Export, ours: Ours, record_property: Record, family: str, rows: str
) -> None:
    """With standard attention; each row has the tier of its own length, whatever its neighbours are."""
    subject = pico_subject(pico(family))
    folder = export(subject, "--attention", "standard")
    prompts = batches(subject)[rows]
    mended = family in MISREAD_BY_OPTIMUM
    alone = tokens_in("optimum", folder, prompts, record_property, mended=mended)
    together = tokens_in("optimum", folder, prompts, record_property, mended=mended, together=True)
    assert [until_end(subject, row) for row in together] == [until_end(subject, row) for row in alone]


@pytest.mark.optimum
def test_a_batch_padded_on_the_left_is_refused_by_the_fused_operator(
    pico: Callable[..., Model], export: Export
) -> None:
    """GroupQueryAttention would take padding for text, so the graph fails and its words name the way out."""
    subject = pico_subject(pico("llama"))
    request = {"folder": str(export(subject)), "prompts": batches(subject)["below"], "new_tokens": NEW}
    done = attempt(command_of("optimum"), {**request, "together": True})
    assert done.returncode != 0
    assert "--attention standard" in done.stderr
    equal = [subject.prompts["below"], subject.prompts["crossing"][:30]]
    assert attempt(command_of("optimum"), {**request, "prompts": equal, "together": True}).returncode == 0


@pytest.mark.optimum
@pytest.mark.parametrize("family", sorted(MISREAD_BY_OPTIMUM))
def test_optimum_fails_loudly_where_it_misreads_the_cache(
    pico: Callable[..., Model], export: Export, ours: Ours, family: str
) -> None:
    """Without being told the shape it stops at the first pass. Should this fail, optimum has learnt it: the mending in
    run_optimum.py and the words in the documentation can go."""
    subject = pico_subject(pico(family))
    done = attempt(command_of("optimum"), {"folder": str(export(subject)), "prompts": [[5, 6, 7]], "new_tokens": 1})
    assert done.returncode != 0 and "Got invalid dimensions for input: past_key_values" in done.stderr


# --- what is exact --------------------------------------------------------------------------------------------------


@pytest.mark.genai
def test_genai_can_be_made_to_read_anew(export: Export, ours: Ours, record_property: Record) -> None:
    """--genai-rewind: at 4097 tokens onnxruntime-genai computes the sequence again, which is the exact policy; without
    it, it goes on with its cache, which gives other tokens."""
    subject = demo_subject()
    prompts = [subject.prompts["crossing"]]
    exact = ours(subject, export(subject), "exact", "crossing")
    assert tokens_in("genai", export(subject, "--genai-rewind"), prompts, record_property) == exact
    assert tokens_in("genai", export(subject), prompts, record_property) != exact


# --- in a browser ---------------------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def site(folder: Path, model: Path | None) -> Path:
    """What a user's folder looks like: the page as it is, a model and node_modules beside it."""
    folder.mkdir()
    for path in WEB.iterdir():
        if path.suffix in (".html", ".js"):
            shutil.copy(path, folder)
    (folder / "node_modules").symlink_to(Path(node_modules(), "node_modules").resolve())
    if model is not None:
        (folder / "model").symlink_to(model)
    return folder


def opened(folder: Path, runs: Sequence[dict[str, Any]], record: Record) -> dict[str, Any]:
    """What the page in a folder shows after the runs; it asked nobody but its own server."""
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("there is no chromium on the PATH")
    with served(folder) as url:
        command = ["node", HERE / "open_page.mjs", node_modules(), chromium]
        found = answer(command, {"url": url, "runs": list(runs)})
        for name, version in found["versions"].items():
            record(name, version)
        foreign = [made for made in found["requests"] if not made.startswith((url, f"blob:{url}", "data:"))]
        assert foreign == []
    return found


def asked(tokens: list[int], *, recompute: bool = True, screenshot: Path | None = None) -> dict[str, Any]:
    text = demo_tokenizer().decode(tokens)
    assert demo_tokenizer().encode(text, add_special_tokens=False).ids == tokens
    picture = str(screenshot) if screenshot else None
    return {"text": text, "new_tokens": NEW, "recompute": recompute, "screenshot": picture}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("LRCONVERT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.browser
def test_the_page_completes_past_the_window(
    export: Export, ours: Ours, record_property: Record, tmp_path: Path, pictures: Path
) -> None:
    """WebAssembly's tokens are ONNX Runtime's: within the window, and across it under either policy, which the page
    names where it crosses."""
    subject = demo_subject()
    folder = export(subject)
    below, crossing = subject.prompts["below"], subject.prompts["crossing"]
    runs = [
        asked(below, screenshot=pictures / "within.png"),
        asked(crossing, recompute=True, screenshot=pictures / "exact.png"),
        asked(crossing, recompute=False, screenshot=pictures / "cached.png"),
    ]
    found = opened(site(tmp_path / "site", folder), runs, record_property)
    assert found["failure"] is None
    assert [message for message in found["messages"] if message.startswith("error:")] == []
    within, exact, cached = found["answers"]
    assert [within["tokens"], exact["tokens"]] == ours(subject, folder, "exact", "below", "crossing")
    assert [cached["tokens"]] == ours(subject, folder, "cached", "crossing")
    assert exact["tokens"] != cached["tokens"]
    assert within["counts"] == "60 tokens + 20 new: within the original window"
    assert exact["counts"] == "4,090 tokens + 20 new: crosses the original window"
    assert "past the original window" not in within["output"]
    assert "4,096 tokens: past the original window; read again with the factors for long texts" in exact["output"]
    assert "past the original window; earlier tokens keep the factors for short texts" in cached["output"]
    assert all(run["screenshot"] is None or Path(run["screenshot"]).stat().st_size > 10_000 for run in runs)


@pytest.mark.browser
def test_the_build_without_float64_runs_what_was_made_for_it(
    export: Export, ours: Ours, record_property: Record, tmp_path: Path
) -> None:
    """transformers.js takes the build with WebGPU unless told otherwise; it has no float64. --no-double runs there, and
    the failure of any other export is said in words."""
    subject = demo_subject()
    runs = [asked(subject.prompts["below"])]
    answers = {}
    for options in ((), ("--no-double",)):
        folder = site(tmp_path / f"site{len(options)}", export(subject, *options))
        page = folder / "index.html"
        html = page.read_text(encoding="utf-8")
        page.write_text(html.replace("ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"), encoding="utf-8")
        answers[options] = opened(folder, runs, record_property)
    assert "has no code for an operator of the model" in answers[()]["failure"]
    shown = answers[("--no-double",)]["answers"][0]
    assert [shown["tokens"]] == ours(subject, export(subject), "cached", "below")


@pytest.mark.browser
def test_the_page_can_be_stopped(export: Export, ours: Ours, record_property: Record, tmp_path: Path) -> None:
    """What was written until then stays, and the next text is completed as if nothing had happened."""
    subject = demo_subject()
    prompt = asked(subject.prompts["below"])
    runs = [{**prompt, "new_tokens": 3000, "stop": True}, prompt]
    stopped, completed = opened(site(tmp_path / "site", export(subject)), runs, record_property)["answers"]
    assert "Stopped." in stopped["outcome"] and 0 < len(stopped["tokens"]) < 3000
    count = min(NEW, len(stopped["tokens"]))
    assert stopped["tokens"][:count] == completed["tokens"][:count] and len(completed["tokens"]) == NEW


@pytest.mark.browser
def test_the_page_says_what_is_wrong(
    export: Export, ours: Ours, record_property: Record, tmp_path: Path, pictures: Path
) -> None:
    """No model; a text longer than the window; a text that the standard operator can't hold in 32 bits."""
    subject = demo_subject()
    nothing = opened(site(tmp_path / "empty", None), [], record_property)
    assert "There is no exported model at /model/" in nothing["failure"]
    tokens = demo_tokenizer().encode(demo_text(), add_special_tokens=False).ids
    folder = site(tmp_path / "standard", export(subject, "--attention", "standard"))
    runs = [asked(tokens[:32_760]), asked(tokens[:4200], screenshot=pictures / "failure.png")]
    too_long, too_large = opened(folder, runs, record_property)["answers"]
    assert "12 more than the window of 32768 holds" in too_long["failure"]
    assert "An export with --attention gqa does without" in too_large["failure"]
    assert too_large["tokens"] == []
