# SPDX-License-Identifier: Apache-2.0
"""Files that say something else than source and recipe: every tamper is caught, with its digest put right, by reading
alone; and what means nothing is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import recipe_for
from support.forks import ForkedCommands
from support.gguf_files import WINDOW
from support.pico import write_pico
from support.tampers import EMBEDDING, GGUF, HF, ONNX, TAMPERS, Tamper, in_json, in_weights, rewrite_digests
from support.verifying import verify
from support.vocabularies import STYLES

from lrconvert.api.verifying import verify as command
from lrconvert.artifact.bake import bake
from lrconvert.artifact.manifest import manifest_path
from lrconvert.checkpoint import open_model
from lrconvert.errors import LrconvertError, UsageError
from lrconvert.parity import Options, Report
from lrconvert.targets import gguf, hf, onnx

FILES = Options(files_only=True)
FORMATS = (HF, GGUF, ONNX)
Copy = Callable[[str], Path]
CASES = [(format_, tamper) for tamper in TAMPERS for format_ in tamper.formats]


def named(cases: list[tuple[str, Tamper]]) -> list[str]:
    return [f"{format_}-{tamper.name}" for format_, tamper in cases]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Llama with a tokenizer, a chat template and generation settings."""
    folder, tokenizer = tmp_path_factory.mktemp("source") / "pico", STYLES["gpt-2"].tokenizer()
    rows = tokenizer.get_vocab_size() + 5
    write_pico(folder, max_position_embeddings=WINDOW, vocab_size=rows, eos_token_id=1, bos_token_id=0)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>", "bos_token": "<|endoftext|>",
                "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "model_max_length": WINDOW,
                "tokenizer_file": "/home/somebody/tokenizer.json"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    return folder


@pytest.fixture(scope="module")
def healthy(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact of each format."""
    model, root = open_model(source), tmp_path_factory.mktemp("healthy")
    recipe = recipe_for(model, even=True)
    made = {HF: root / "a", GGUF: root / "m.gguf", ONNX: root / "o"}
    bake(hf.plan(model, recipe, made[HF]), link=False)
    bake(gguf.plan(model, recipe, made[GGUF], gguf.Options(type="f32", modelfile=True)))
    bake(onnx.plan(model, recipe, made[ONNX]))
    for artifact in made.values():
        assert verify(artifact, options=FILES).passed  # which completes the digests
    return made


@pytest.fixture
def copy(healthy: dict[str, Path], tmp_path: Path) -> Copy:
    """A copy of the artifact of a format."""

    def get(format_: str) -> Path:
        artifact = healthy[format_]
        if artifact.is_dir():
            return Path(shutil.copytree(artifact, tmp_path / artifact.name))
        for path in artifact.parent.glob(f"{artifact.stem}.*"):
            shutil.copy(path, tmp_path)
        return tmp_path / artifact.name

    return get


def failures(artifact: Path, **keywords: object) -> list[str]:
    """The reasons of every failed row, or the error, of reading alone."""
    try:
        report: Report = verify(artifact, options=FILES, **keywords)
    except LrconvertError as error:  # a file that can't be opened any more is caught too
        return [error.message]
    return [row.reason for row in report.failed]


@pytest.mark.parametrize(("format_", "tamper"), CASES, ids=named(CASES))
def test_every_tamper_is_caught(copy: Copy, format_: str, tamper: Tamper) -> None:
    """Its digest is right, and no logit says anything: the files do."""
    artifact = copy(format_)
    tamper.edit(artifact)
    rewrite_digests(artifact)
    assert failures(artifact), tamper.name


def test_code_that_is_not_ours_is_said_where_nothing_runs(copy: Copy) -> None:
    """Its digest is right too: a `skipped` row, as where it would have been run. Who wrote it may vouch for it."""
    artifact = copy(HF)
    code = artifact / "modeling_longrope.py"
    code.write_text(code.read_text() + "\nimport os\n")
    rewrite_digests(artifact)
    report = verify(artifact, options=FILES)
    assert [row.code for row in report.rows if row.verdict == "skipped" and "byte for byte" in row.reason] == ["custom"]
    assert not [row for row in verify(artifact, options=replace(FILES, trust_code=True)).rows if row.code == "custom"]


def test_losses_that_are_not_said_are_found(source: Path, tmp_path: Path) -> None:
    """A manifest, and the card that is made of it, say what the artifact can't do."""
    model, artifact = open_model(source), tmp_path / "m.gguf"
    recipe = recipe_for(model, start_tokens=4)
    bake(gguf.plan(model, recipe, artifact, gguf.Options(type="f32", lossy=True)))
    assert verify(artifact, options=FILES).passed
    in_json(manifest_path(artifact).name, lambda value: value.update(losses=[]))(artifact.parent)
    assert any("there are more" in reason for reason in failures(artifact))


ALONE = [case for case in CASES if case[1].alone]


@pytest.mark.parametrize(("format_", "tamper"), ALONE, ids=named(ALONE))
def test_what_contradicts_itself_is_caught_without_the_source(copy: Copy, format_: str, tamper: Tamper) -> None:
    artifact = copy(format_)
    forget_source(artifact)
    tamper.edit(artifact)
    rewrite_digests(artifact)
    assert failures(artifact), tamper.name


def forget_source(artifact: Path) -> None:
    manifest = manifest_path(artifact)
    in_json(manifest.name, lambda value: value["source"].update(model="/gone/away"))(manifest.parent)


@pytest.mark.parametrize("format_", FORMATS)
def test_without_the_source_a_row_says_what_was_not_compared(copy: Copy, format_: str) -> None:
    artifact = copy(format_)
    forget_source(artifact)
    report = verify(artifact, options=FILES)
    assert report.passed, report.summary
    skipped = [row for row in report.rows if row.verdict == "skipped"]
    assert [row.code for row in skipped] == ["source"] and "chat template" in skipped[0].reason
    assert "weights" not in {row.code for row in report.rows}


# --- healthy ones ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", (HF, ONNX))
def test_what_means_nothing_is_no_difference(copy: Copy, format_: str) -> None:
    """Spaces, the order of keys, 1 for 1.0, and what publishing takes out: the paths of a machine."""
    artifact = copy(format_)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        value = json.loads((artifact / name).read_text())
        value.pop("tokenizer_file", None)
        value |= {key: int(item) for key, item in value.items() if isinstance(item, float) and item == int(item)}
        (artifact / name).write_text(json.dumps(dict(reversed(value.items()))))
    (artifact / "notes.txt").write_text("mine")
    (artifact / "README.md").write_text("mine too")
    rewrite_digests(artifact)
    assert failures(artifact) == []


QUANTISED = [(GGUF, "q8_0", 1.3), (GGUF, "q4_0", -1.0), (ONNX, "int8", 1.3), (ONNX, "int4", 1.3)]


@pytest.mark.parametrize(("format_", "kind", "scale"), QUANTISED)
def test_a_row_of_a_quantised_tensor_is_seen(
    source: Path, tmp_path: Path, format_: str, kind: str, scale: float
) -> None:
    """One row among a thousand is no part of a tensor's norm: rows are judged by themselves, and healthy ones pass."""
    model = open_model(source)
    recipe = recipe_for(model, even=True)
    if format_ == GGUF:
        artifact, plan = tmp_path / "m.gguf", gguf.plan(model, recipe, tmp_path / "m.gguf", gguf.Options(type=kind))
    else:
        artifact, plan = tmp_path / "o", onnx.plan(model, recipe, tmp_path / "o", onnx.Options(dtype=kind))
    bake(plan)
    assert failures(artifact) == []
    other = Path(shutil.copytree(source, tmp_path / "other"))
    in_weights(lambda tensors: tensors[EMBEDDING][800].__imul__(np.float32(scale)))(other)
    reasons = failures(artifact, against=str(other))
    assert len(reasons) == 1 and "in row 800" in reasons[0], reasons


def test_what_another_program_left_out_is_shown(copy: Copy, source: Path) -> None:
    """Without a manifest nobody knows who wrote the files: what was added or lost is `known`, contradictions fail."""
    artifact, model = copy(HF), open_model(source)
    recipe = recipe_for(model, even=True)
    (artifact / "lrconvert.json").unlink()
    in_json("config.json", lambda config: (config.pop("pad_token_id"), config.update(use_cache=True)))(artifact)
    report = verify(artifact, options=FILES, against=str(source), recipe=recipe)
    assert report.passed, report.summary
    known = [row.reason for row in report.rows if row.verdict == "known"]
    assert len(known) == 1 and "pad_token_id" in known[0] and "use_cache" in known[0]
    in_json("config.json", lambda config: config.update(eos_token_id=7))(artifact)
    assert not verify(artifact, options=FILES, against=str(source), recipe=recipe).passed


def test_files_only_runs_nothing_and_takes_no_such_options(healthy: dict[str, Path]) -> None:
    """What would be ignored is refused."""
    for more in ({"codes": ["native"]}, {"runtime": "transformers"}, {"full": True}, {"python": "python3"}):
        with pytest.raises(UsageError, match="--files-only"):
            command(healthy[HF], files_only=True, **more)  # type: ignore[arg-type]


NEEDS_NOTHING = """
import sys
for name in ("torch", "transformers", "onnxruntime", "llama_cpp"):
    sys.modules[name] = None
from lrconvert.cli import run
sys.exit(run(["verify", sys.argv[1], "--files-only"]))
"""


@pytest.mark.parametrize("format_", FORMATS)
def test_files_only_needs_no_runtime(healthy: dict[str, Path], commands: ForkedCommands, format_: str) -> None:
    """Where neither torch nor a runtime is installed the files are compared all the same."""
    done = commands.run(NEEDS_NOTHING, healthy[format_])
    assert done.returncode == 0, done.stderr
    assert "verified, files only" in done.stdout
