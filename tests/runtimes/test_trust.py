# SPDX-License-Identifier: Apache-2.0
"""No code of a folder runs unless it is ours, byte for byte; a worker gets no token and no folder of the user's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import own_name, recipe_for
from support.verifying import verify

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import Model
from lrconvert.checkpoint.folder_code import (
    AUTO_MAP,
    KNOWN,
    known_digests,
    refuses_custom,
    refuses_mlx,
    refuses_native,
    stage,
)
from lrconvert.errors import UnsupportedError
from lrconvert.evals.subject import Subject, opened
from lrconvert.families import family_names
from lrconvert.parity import Options
from lrconvert.runtimes.base import Interpreter, worker_environment
from lrconvert.targets import hf
from lrconvert.targets.hf import known_code

# sha256 of the file as the first commits had it: artifacts of those days still run.
EARLIER = (
    "f41e0b20eb2e1a0954a14fab82406e027978df5a372c534ead60d578223f417f",
    "fe701a7e9712192a59ab285e3bfc4f96963503bcce11ec41179f21861d3caf42",
    "ef0ddeab57b6baf8ae7217cb5f0da23d52fac86f0bb8c29639961521d7f92b77",
)


@pytest.fixture
def artifact(pico: Callable[..., Model], tmp_path: Path) -> Path:
    model = pico("llama")
    output = own_name(tmp_path / "a")
    bake(hf.plan(model, recipe_for(model, even=True), output))
    return output


def edit_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) | keys
    path.unlink()
    path.write_text(json.dumps(config))


def plant(folder: Path, marker: Path) -> None:
    """Code that leaves a trace, with its digest in the manifest."""
    path = folder / "modeling_longrope.py"
    text = path.read_text() + f"\nimport os\nopen({str(marker)!r}, 'w').write(os.environ.get('HF_TOKEN', 'none'))\n"
    path.unlink()
    path.write_text(text)
    manifest = json.loads((folder / "lrconvert.json").read_text())
    manifest["files"][path.name] = {"size": len(text.encode()), "sha256": None}
    (folder / "lrconvert.json").write_text(json.dumps(manifest))


# --- which code is ours -----------------------------------------------------------------------------------


def test_every_modeling_file_that_was_ever_written_is_known() -> None:
    """`tools/fix` adds a row a family when the file changes."""
    known = json.loads(KNOWN.read_text())
    assert known_code.missing(known) == []
    assert set(EARLIER) <= known_digests()
    assert known_code.main(["--check"]) == 0


def test_a_changed_modeling_file_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = known_code.modeling_code
    monkeypatch.setattr(known_code, "modeling_code", lambda name: original(name) + b"#\n")
    assert len(known_code.missing(json.loads(KNOWN.read_text()))) == len(family_names())
    assert known_code.main(["--check"]) == 1


def test_what_a_bake_writes_is_ours(artifact: Path) -> None:
    assert refuses_custom(artifact) is None and refuses_native(artifact) is None and refuses_mlx(artifact) is None


OTHERS = ["x.Model", "you/repo--modeling_longrope.LongRopeForCausalLM", ["a.B", None], None, 7]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_auto_map_may_name_nothing_else(artifact: Path, other: object) -> None:
    edit_config(artifact, auto_map={**AUTO_MAP, "AutoConfig": other})
    assert "auto_map names" in (refuses_custom(artifact) or "")
    edit_config(artifact, auto_map=other)
    assert "auto_map names" in (refuses_custom(artifact) or "")


def test_code_that_nobody_names_is_refused_too(artifact: Path) -> None:
    """What transformers and mlx-lm load without a word of config.json's auto_map."""
    (artifact / "custom_generate").mkdir()
    assert "custom_generate" in (refuses_custom(artifact) or "")
    (artifact / "custom_generate").rmdir()
    (artifact / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in (refuses_custom(artifact) or "") and "adapter_config.json" in (
        refuses_native(artifact) or ""
    )
    (artifact / "adapter_config.json").unlink()
    edit_config(artifact, attn_implementation="you/kernel", model_file="model.py")
    assert "kernels" in (refuses_native(artifact) or "") and "kernels" in (refuses_custom(artifact) or "")
    assert "model.py" in (refuses_mlx(artifact) or "")


def test_the_file_is_compared_byte_for_byte(artifact: Path) -> None:
    path = artifact / "modeling_longrope.py"
    code = path.read_bytes()
    for changed in (code + b"\n", code.replace(b"import LlamaFor", b"import GemmaFor"), code[:-1], b""):
        path.unlink()
        path.write_bytes(changed)
        assert "byte for byte" in (refuses_custom(artifact) or "")
    path.unlink()
    assert refuses_custom(artifact) is None  # nothing is there to run: loading it fails
    path.mkdir()
    assert "no plain file" in (refuses_custom(artifact) or "")


def test_what_runs_is_what_was_compared(artifact: Path, tmp_path: Path) -> None:
    """The worker's folder holds copies of config and code, the weights, and nothing else."""
    (artifact / "evil.py").write_text("raise SystemExit")
    into = tmp_path / "staged"
    into.mkdir()
    stage(artifact, into)
    assert {path.name for path in into.iterdir()} <= {
        "config.json",
        "modeling_longrope.py",
        "generation_config.json",
        "model.safetensors",
    }
    assert not (into / "modeling_longrope.py").is_symlink()
    (artifact / "modeling_longrope.py").unlink()
    (artifact / "modeling_longrope.py").write_text("raise SystemExit")
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(UnsupportedError, match="byte for byte"):
        stage(artifact, again)


# --- verify and eval --------------------------------------------------------------------------------------


def test_verify_runs_no_code_of_strangers(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code is asked all the same; alone, other code ends with exit code 4; with --trust-code it runs."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    marker = tmp_path / "ran"
    plant(artifact, marker)
    report = verify(artifact, options=Options(threads=1))
    (row,) = (row for row in report.rows if row.code == "custom")
    assert (row.case, row.verdict) == ("code of the folder", "skipped")
    assert "byte for byte" in row.reason and "--trust-code" in row.reason
    assert report.passed and not marker.exists()
    with pytest.raises(UnsupportedError, match="custom code is not run") as raised:
        verify(artifact, options=Options(threads=1, backends=("custom",)))
    assert raised.value.exit_code == 4 and not marker.exists()
    trusted = verify(artifact, options=Options(threads=1, backends=("custom",), trust_code=True))
    assert trusted.passed and marker.read_text() == "none"  # it ran, and saw no token


def test_eval_runs_no_code_of_strangers(artifact: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    plant(artifact, marker)
    with (
        pytest.raises(UnsupportedError, match=r"byte for byte.*--code.*--trust-code"),
        opened(Subject.of(str(artifact)), text=False),
    ):
        pass
    assert not marker.exists()


# --- workers ----------------------------------------------------------------------------------------------

SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "OPENAI_API_KEY",
    "VLLM_API_KEY", "CUDA_AUTH", "GITHUB_TOKEN", "SSH_AUTH_SOCK", "NETRC", "https_proxy", "PYTHONPATH", "ANYTHING",
)  # fmt: skip


def test_a_worker_gets_no_token_and_no_folder_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of a process that really starts."""
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "for line in sys.stdin:\n"
        "    print(json.dumps({'environment': dict(os.environ), 'folder': os.getcwd()}), flush=True)\n"
    )
    interpreter = Interpreter(script)
    try:
        answer = interpreter.ask({})
    finally:
        interpreter.close()
    found, home = answer["environment"], str(Path(answer["folder"]))
    assert not {*SECRETS} & {*found} and "secret" not in found.values()
    assert found["HF_HUB_OFFLINE"] == found["TRANSFORMERS_OFFLINE"] == "1"
    assert found["OMP_NUM_THREADS"] == "1" and found["PATH"]
    assert Path(found["HOME"]).name == Path(found["HF_HOME"]).name == Path(home).name == "home"
    assert not Path(home).exists()  # it is gone with the worker


def test_a_relative_interpreter_is_found_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    script = tmp_path / "worker.py"
    script.write_text("for line in open(0):\n    print('{}', flush=True)\n")
    monkeypatch.chdir(tmp_path)
    interpreter = Interpreter(script, python="./python")
    try:
        assert interpreter.ask({}) == {}
    finally:
        interpreter.close()


def test_names_are_passed_by_a_list(tmp_path: Path) -> None:
    given = {"PATH": "p", "CUDA_VISIBLE_DEVICES": "0", "CUDA_SECRET": "s", "PATHETIC": "x", "lc_all": "C"}
    found = worker_environment(given, tmp_path)
    assert {*given} & {*found} == {"PATH", "CUDA_VISIBLE_DEVICES", "lc_all"}
