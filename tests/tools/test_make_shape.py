# SPDX-License-Identifier: Apache-2.0
"""tools/make_shape.py: true shapes, exact sizes, weights that show a wrong rotation, and runs that are interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import make_shape
import numpy as np
import pytest
from conftest import Result, recipe_for

from lrconvert.checkpoint import open_model
from lrconvert.errors import EnvironmentFailure, UsageError
from lrconvert.recipe import write_recipe

# Parameters of the published models, as their safetensors indexes and model cards count them.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "phi-3-mini": 3_821_079_552,
    "qwen3-8b": 8_190_735_360,
    "llama3-70b": 70_553_706_496,
    "phi-3.5-moe": 41_873_153_344,
    "mixtral-8x7b": 46_702_792_704,
}
TINY = {
    **make_shape.SHAPES["llama2-7b"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4100,
}
LIMIT = 600_000  # embedding, layers and lm_head of the tiny shape in shards of their own


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape of a megabyte, in three shards."""
    monkeypatch.setitem(make_shape.SHAPES, "tiny", TINY)
    plan = make_shape.plan_shards
    monkeypatch.setattr(make_shape, "plan_shards", lambda tensors: plan(tensors, LIMIT))
    return "tiny"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_shape_has_the_parameters_of_the_published_model() -> None:
    assert set(make_shape.SHAPES) == set(PUBLISHED)
    for name, parameters in PUBLISHED.items():
        tensors = make_shape.planned(make_shape.shape_config(name))
        assert sum(tensor.nbytes for tensor in tensors) == 2 * parameters, name


def test_a_dry_run_says_the_exact_sizes_and_writes_nothing(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert make_shape.main([tiny, "-o", str(output), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not output.exists()
    assert make_shape.main([tiny, "-o", str(output)]) == 0
    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        assert f"{shard.name}  {shard.stat().st_size:>14,} bytes" in said
    assert f"{sum(shard.stat().st_size for shard in shards):,} bytes would be written" in said


def test_q_and_k_are_widened_and_every_tensor_is_its_own(tiny: str, tmp_path: Path) -> None:
    """Deviations as `spread_of` says, rounded to bf16; no two tensors are alike."""
    make_shape.main([tiny, "-o", str(tmp_path / "out")])
    model = open_model(tmp_path / "out")
    seen = set()
    for key, tensor in model.roles.items():
        values = model.checkpoint.read(tensor.name).astype(np.float64)
        mean, deviation = make_shape.spread_of(tensor.role, tensor.shape)
        sure = 6 / np.sqrt(values.size)  # six standard errors
        assert abs(values.mean() - mean) < sure * deviation, key
        assert abs(values.std() / deviation - 1) < sure, key
        seen.add(values.tobytes())
    assert len(seen) == len(model.roles)
    assert make_shape.spread_of("q", (64, 64))[1] == 3 * make_shape.spread_of("v", (64, 64))[1]


def test_it_bakes_and_tokenises(tiny: str, tmp_path: Path, cli: Callable[..., Result]) -> None:
    from lrconvert.checkpoint.tokenizer import tokenizer_of

    source = tmp_path / "out"
    make_shape.main([tiny, "-o", str(source)])
    assert max(tokenizer_of(source)("In the beginning God created")) < TINY["vocab_size"]
    write_recipe(recipe_for(open_model(source)), tmp_path / "recipe")
    done = cli("hf", source, "--recipe", tmp_path / "recipe", "-o", tmp_path / "baked")
    assert done.code == 0, done.err


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shape.main([tiny, "-o", str(tmp_path / "whole")])
    original = make_shape.normal_blocks

    def failing(config: dict[str, object], widen: float) -> make_shape.Blocks:
        blocks = original(config, widen)

        def broken(name: str, nbytes: int) -> Iterator[bytes]:
            if name == "model.norm.weight":
                raise OSError(28, "No space left on device")
            return blocks(name, nbytes)

        return broken

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(make_shape, "normal_blocks", failing)
        assert make_shape.main([tiny, "-o", str(output)]) == 6
    assert not (output / "config.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    assert len(done) == 1
    capsys.readouterr()
    assert make_shape.main([tiny, "-o", str(output)]) == 0
    assert "2 of 3 files written" in capsys.readouterr().out
    assert all((output / name).stat().st_mtime_ns == time for name, time in done.items())
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_weights_that_were_widened_otherwise_are_not_mixed(
    finished: bool, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have the same sizes: only what the folder says of them tells them apart."""
    output = tmp_path / "out"
    make_shape.main([tiny, "-o", str(output)])
    if not finished:
        (output / "config.json").unlink()
        sorted(output.glob("*.safetensors"))[-1].unlink()
    before = contents(output)
    assert make_shape.main([tiny, "-o", str(output), "--widen", "1.25"]) == 2
    assert "widened 3.0 times, not 1.25" in capsys.readouterr().err and contents(output) == before


@pytest.mark.parametrize("widen", ["nan", "inf", "0", "-1"])
def test_weights_have_to_be_numbers(widen: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_shape.main([tiny, "-o", str(tmp_path / "out"), "--widen", widen]) == 2
    assert "--widen" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_another_shape_is_left_alone(tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    make_shape.main([tiny, "-o", str(output)])
    before = contents(output)
    assert make_shape.main([tiny, "-o", str(output), "--layers", "2"]) == 2
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt, not of this shape"):
        make_shape.make(tiny, output, None, dry_run=True)
    assert contents(output) == {**before, "notes.txt": b"mine"}


def test_a_full_disk_is_refused_before_the_work_with_what_fits(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [make_shape.total_bytes(make_shape.shape_config(tiny, count)) for count in (1, 2, 3)]

    def room(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))

    for free, fits in (
        (sizes[2] - 1, "--layers 2 fits"),
        (sizes[1], "--layers 2 fits"),
        (sizes[1] - 1, "--layers 1 fits"),
        (sizes[0] - 1, "not even one layer fits"),
    ):
        room(free)
        with pytest.raises(EnvironmentFailure, match=fits):
            make_shape.make(tiny, tmp_path / "a" / "out", None, dry_run=False)
    assert not (tmp_path / "a").exists()
    room(sizes[2])
    make_shape.make(tiny, tmp_path / "a" / "out", None, dry_run=True)


def test_holes_are_as_long_as_weights(tiny: str, tmp_path: Path) -> None:
    """What the benchmarks use where nothing reads the weights."""
    config = make_shape.shape_config(tiny)
    shards = make_shape.plan_shards(make_shape.planned(config))
    make_shape.write_checkpoint(tmp_path / "holes", config, shards, None)
    for name, shard in shards:
        assert (tmp_path / "holes" / name).stat().st_size == make_shape.shard_bytes(shard)
    index = json.loads((tmp_path / "holes" / make_shape.INDEX).read_text())
    assert set(index["weight_map"].values()) == {name for name, _ in shards}
    assert open_model(tmp_path / "holes").shape.layers == 3


def test_a_count_of_layers_that_it_does_not_have_is_refused(tmp_path: Path) -> None:
    for layers in ("0", "33"):
        assert make_shape.main(["llama2-7b", "-o", str(tmp_path / "out"), "--layers", layers, "--dry-run"]) == 2
