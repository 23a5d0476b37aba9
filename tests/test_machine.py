# SPDX-License-Identifier: Apache-2.0
"""What is too large for the machine is refused before any work, with what would fit: exit code 6.

The measurement is what a test replaces: /proc/meminfo, and what the system says of a disk.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Result, recipe_for
from support.pico import write_pico

import lrconvert
from lrconvert import machine
from lrconvert.checkpoint import open_model
from lrconvert.errors import EnvironmentFailure
from lrconvert.machine import check_disk, check_memory, free_disk, usable_memory
from lrconvert.recipe import write_recipe
from lrconvert.runtimes import runtime_for
from lrconvert.runtimes.backend import OpenOptions

Cli = Callable[..., Result]
Room = Callable[[int], None]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Room:
    """A disk with so many bytes free."""
    return lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Room:
    """A machine with so many bytes of memory that nobody uses."""

    def set_to(free: int) -> None:
        meminfo = tmp_path / "meminfo"
        meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {free // 1024} kB\nSwapFree: 0 kB\n")
        monkeypatch.setattr(machine, "MEMINFO", meminfo)

    return set_to


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A pico model whose weights have some hundred kB."""
    return write_pico(tmp_path / "model", "llama")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    return write_recipe(recipe_for(open_model(model), even=True), tmp_path / "recipe")


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# --- measuring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("", "memory.max"), ("memory", "memory.limit_in_bytes")])
def test_free_memory_is_bounded_by_the_container(
    memory: Room, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, file: str
) -> None:
    """Also by a group inside of it, as a service or a job has one, whichever is less; of both versions of cgroups."""
    memory(8 * 2**30)
    assert usable_memory() == 8 * 2**30
    (tmp_path / "tree" / "job" / "step").mkdir(parents=True)
    monkeypatch.setattr(machine, "CGROUPS", {name: (tmp_path / "tree", file), "other": (tmp_path / "none", file)})
    (tmp_path / "own").write_text(f"5:devices:/elsewhere\n4:{name}:/job/step\n")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    for group in ("", "job", "job/step"):
        limit = tmp_path / "tree" / group / file
        for text, found in (("max", 8 * 2**30), (str(2**30), 2**30), (str(2**40), 8 * 2**30)):
            limit.write_text(text)
            assert usable_memory() == found, group
    (tmp_path / "tree" / file).write_text(str(2**20))
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "gone")  # the tree's own limit is still known
    assert usable_memory() == 2**20


def test_a_system_that_says_nothing_of_free_memory_has_all_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "none")
    assert usable_memory() == machine.total_memory() > 0


def test_the_disk_of_a_folder_that_does_not_exist_is_its_parents(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "not" / "there") > 0


def test_a_refusal_says_what_is_needed_what_there_is_and_what_fits(disk: Room, memory: Room, tmp_path: Path) -> None:
    disk(1000)
    check_disk(tmp_path, 1000, "a file")
    with pytest.raises(EnvironmentFailure, match="a file takes 1,001 bytes, 1,000 are free; 500 fit") as caught:
        check_disk(tmp_path, 1001, "a file", fits=lambda free: f"{free // 2} fit")
    assert caught.value.remedy
    memory(4_096_000)
    check_memory(4_096_000, "a model")
    with pytest.raises(EnvironmentFailure, match=r"a model takes 4\.1 MB of memory or more, 4\.1 MB are there"):
        check_memory(4_096_001, "a model")


# --- commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "fits"),
    [
        (("gguf", "--type", "f32"), "--type q8_0 takes"),
        (("onnx", "--dtype", "f32"), "--dtype f16 takes"),
        (("hf", "--dtype", "f32", "--copy"), "--dtype bf16 takes"),
    ],
)
def test_a_bake_names_what_the_disk_has_room_for(
    command: tuple[str, ...], fits: str, model: Path, recipe: Path, tmp_path: Path, disk: Room, cli: Cli
) -> None:
    name, *options = command
    output = tmp_path / ("out.gguf" if name == "gguf" else "out")
    run = (name, model, "--recipe", recipe, *options, "-o", output)
    disk(int(0.9 * weights(model)))  # float32 weights; half of them in 16 bits, and the small files beside them
    said = cli(*run)
    assert said.code == 6, said.err
    assert "bytes are free" not in said.err and " are free; " in said.err
    assert fits in said.err
    assert not list(tmp_path.glob("*out*"))
    disk(10)
    said = cli(*run)
    assert said.code == 6
    assert "takes" in said.err and fits not in said.err  # nothing fits
    disk(10**9)
    assert cli(*run).code == 0


def test_the_demo_needs_room(tmp_path: Path, disk: Room, cli: Cli) -> None:
    disk(10**6)
    said = cli("demo", "-o", tmp_path / "demo")
    assert said.code == 6 and "the demo takes 25,000,000 bytes, 1,000,000 are free" in said.err, said.err
    assert not (tmp_path / "demo").exists()


def test_hard_links_need_no_room(model: Path, recipe: Path, tmp_path: Path, disk: Room, cli: Cli) -> None:
    disk(weights(model) // 2)
    run = ("hf", model, "--recipe", recipe, "-o", tmp_path / "out")
    assert cli(*run, "--copy").code == 6
    assert cli(*run).code == 0


def test_a_dry_run_needs_no_room(model: Path, recipe: Path, tmp_path: Path, disk: Room, cli: Cli) -> None:
    disk(0)
    assert cli("gguf", model, "--recipe", recipe, "-o", tmp_path / "out.gguf", "--dry-run").code == 0


@pytest.mark.parametrize("target", ["hf", "onnx"])
def test_verify_and_eval_refuse_what_memory_can_not_hold(
    target: str, model: Path, recipe: Path, tmp_path: Path, memory: Room, cli: Cli
) -> None:
    """Before a runtime starts. `--files-only` loads nothing and is not refused."""
    artifact = tmp_path / "artifact"
    assert cli(target, model, "--recipe", recipe, "-o", artifact).code == 0
    memory(weights(model) // 2)
    said = cli("verify", artifact)
    assert said.code == 6
    assert f"artifact in {'native' if target == 'hf' else 'onnxruntime'} code takes" in said.err
    np.save(tmp_path / "tokens.npy", np.arange(200) % 50)
    evaluated = cli("eval", "perplexity", artifact, "--text", tmp_path / "tokens.npy", "--lengths", "64")
    assert evaluated.code == 6, evaluated.err
    assert "of memory or more" in evaluated.err
    assert cli("verify", artifact, "--files-only").code == 0


def test_verify_names_a_dtype_that_fits(model: Path, recipe: Path, tmp_path: Path, memory: Room, cli: Cli) -> None:
    assert cli("hf", model, "--recipe", recipe, "-o", tmp_path / "artifact").code == 0
    memory(int(weights(model) * 0.8))
    said = cli("verify", tmp_path / "artifact")
    assert said.code == 6
    assert "--dtype bf16 takes" in said.err


def test_the_reference_needs_room_too(model: Path, recipe: Path, tmp_path: Path, memory: Room, cli: Cli) -> None:
    """llama.cpp maps a file and takes nothing at first; the reference has at least the head in memory."""
    assert cli("gguf", model, "--recipe", recipe, "-o", tmp_path / "m.gguf").code == 0
    shape = open_model(model).shape
    memory(4 * shape.vocab * shape.hidden - 1024)
    said = cli("verify", tmp_path / "m.gguf")
    assert said.code == 6 and "in the reference takes" in said.err, said.err
    assert cli("verify", tmp_path / "m.gguf", "--files-only").code == 0


@pytest.mark.parametrize("target", ["hf", "onnx", "gguf"])
def test_a_gpu_has_its_own_memory(
    target: str, model: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that llama.cpp would map on a CPU has to be copied to a GPU, with all its parts."""
    artifact = tmp_path / ("m.gguf" if target == "gguf" else "artifact")
    split = {"split": 200_000} if target == "gguf" else {}
    artifact = getattr(lrconvert, target)(model, recipe, artifact, **split).path
    parts = list(tmp_path.glob("m-*.gguf"))
    assert len(parts) != 1
    whole = sum(path.stat().st_size for path in parts) or weights(model)
    monkeypatch.setattr(machine, "gpu_memory", lambda device: int(0.9 * whole))
    (code,) = [code for code in runtime_for(target, None).backends_of(artifact, None) if code.name != "custom"]
    with pytest.raises(EnvironmentFailure, match="of memory or more"):
        code.check_memory(artifact, OpenOptions(device="cuda"))
    code.check_memory(artifact, OpenOptions(device="cpu"))
    monkeypatch.setattr(machine, "gpu_memory", lambda device: None)  # nobody can say: the program will
    code.check_memory(artifact, OpenOptions(device="cuda"))


def test_search_refuses_documents_that_memory_can_not_hold(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    """Before the model is loaded, with the length that fits; the journal holds no evaluation."""
    from lrconvert.searching import estimate

    np.save(tmp_path / "tokens.npy", np.arange(9000) % 50)
    text = tmp_path / "tokens.npy"
    run = ("search", model, "--text", text, "--target", "1024", "--device", "cpu", "-o", tmp_path / "o")
    monkeypatch.setattr(estimate, "device_memory", lambda device: int(1.05 * weights(model)))
    said = cli(*run)
    assert said.code == 6, said.err
    assert "a search on documents of 1024 tokens on cpu takes" in said.err
    assert "tokens fit" in said.err
    monkeypatch.setattr(estimate, "device_memory", lambda device: weights(model) // 2)
    assert "its weights alone take" in cli(*run).err


HOLES = """
from lrconvert.machine import release_freed

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) // 1024

blocks = [b"x" * 100_000 for _ in range(2_000)]
blocks = blocks[::20]
before = resident()
release_freed()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such call")
def test_freed_memory_goes_back_to_the_system() -> None:
    """190 MB between blocks that stay: the heap does not shrink by itself."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100, done.stdout
