# SPDX-License-Identifier: Apache-2.0
"""Damaged ONNX folders: `inspect` explains or refuses each, reading and verifying it gives an error of ours, a report
that fails, or what it gave before. Never a bug, a second line, a hang, or memory that the folder does not have.

`LRCONVERT_MUTATIONS=100000 python -m pytest -m slow tests/checkpoint/test_hostile_onnx.py` tries as many.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import recipe_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.hostile import answer
from support.onnx_files import DATA, GRAPH, attribute, call_of, command, export, graph_of, set_attribute
from support.pico import write_pico
from support.verifying import verify

from lrconvert.artifact.manifest import MANIFEST
from lrconvert.checkpoint import open_model
from lrconvert.checkpoint.onnx_folder import OnnxCheckpoint
from lrconvert.errors import LrconvertError
from lrconvert.parity import Options
from lrconvert.recipe import Recipe, load_recipe, write_recipe
from lrconvert.runtimes.base import Interpreter
from lrconvert.runtimes.onnxruntime import WORKER

QUICK = int(os.environ.get("LRCONVERT_QUICK_MUTATIONS", "800"))
MANY = int(os.environ.get("LRCONVERT_MUTATIONS", "100000"))
MEMORY = 24 * 2**20  # what a look may take: the folder has a tenth of it
SMALL: dict[str, Any] = {
         "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "f32": {},
    "int4": {"dtype": "int4", "attention": "standard"},
    "tables": {"double": False, "dtype": "f16"},
}
SLOW_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
Change = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True)
class Base:
    """A healthy folder without manifest, its graph, and what it is compared with."""

    folder: Path
    graph: bytes
    source: Path
    recipe: Path

    def restore(self) -> None:
        (self.folder / GRAPH).write_bytes(self.graph)


@pytest.fixture(scope="module")
def bases() -> Iterator[dict[str, Base]]:
    """In memory, where the system has a place for that."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        root = Path(name)
        source = write_pico(root / "source", tie_word_embeddings=True, **SMALL)
        model = open_model(source)
        recipe = write_recipe(recipe_for(model, tiers=3, start_tokens=5), root / "recipe")
        made = {}
        for kind, options in KINDS.items():
            folder = export(model, recipe_for(model, tiers=3, start_tokens=5), root / kind, **options)
            (folder / MANIFEST).unlink()
            made[kind] = Base(folder, (folder / GRAPH).read_bytes(), source, recipe)
        yield made


@pytest.fixture(scope="module")
def options() -> Iterator[Options]:
    interpreter = Interpreter(WORKER)
    yield Options(threads=1, interpreter=interpreter)
    interpreter.close()


# --- what has to hold ------------------------------------------------------------------------------------


def look(folder: Path) -> tuple[int, int]:
    """Exit codes of `inspect`, and of opening the folder and reading every tensor and tier of it."""
    looked, _ = answer("inspect", folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = open_model(folder)
            assert isinstance(model.checkpoint, OnnxCheckpoint)
            for tensor in model.roles.values():
                assert model.checkpoint.read(tensor.name).shape == tensor.shape
            assert model.checkpoint.tiers and model.checkpoint.attention in ("gqa", "standard")
    except LrconvertError as error:
        assert error.exit_code in (3, 4) and str(error).strip()
        return looked, error.exit_code
    return looked, 0


def exit_code(base: Base, options: Options) -> int:
    """Exit code of `verify` against the source: 0, 5 or what it refuses with."""
    try:
        recipe: Recipe = load_recipe(base.recipe)
        report = verify(base.folder, against=str(base.source), recipe=recipe, options=options)
    except LrconvertError as error:
        assert error.exit_code in (3, 4), error
        return error.exit_code
    json.dumps(report.to_json())
    return 0 if report.passed else 5


@pytest.fixture
def at_once() -> Iterator[None]:
    """What waits for a pipe is ended after ten seconds, as an error."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- damage with a name ----------------------------------------------------------------------------------

NORM, UP = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"


def tensor_of(model: onnx.ModelProto, name: str) -> TensorProto:
    (found,) = [each for each in model.graph.initializer if each.name in (name, f"{name}.packed")]
    return found


def place(key: str, value: str, name: str = UP) -> Change:
    """An entry of a tensor's place in the data file."""

    def change(model: onnx.ModelProto) -> None:
        (entry,) = [entry for entry in tensor_of(model, name).external_data if entry.key == key]
        entry.value = value

    return change


def without_place(key: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = tensor_of(model, UP)
        kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != key]
        del tensor.external_data[:]
        for name, value in kept:
            tensor.external_data.add(key=name, value=value)

    return change


def dims(*shape: int, length: int | None = None) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor_of(model, UP).dims[:] = shape
        if length is not None:
            place("length", str(length))(model)

    return change


def kind(data_type: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor_of(model, UP).data_type = data_type

    return change


def as_bytes(model: onnx.ModelProto) -> None:
    """A plain tensor of bytes, all of which are there."""
    tensor = tensor_of(model, NORM)
    tensor.data_type = TensorProto.UINT8
    place("length", str(int(np.prod(tensor.dims))), NORM)(model)


def inline(model: onnx.ModelProto) -> None:
    """Weights in the graph itself: not what is written, though ONNX allows it."""
    tensor = tensor_of(model, UP)
    made = numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name)
    tensor.CopyFrom(made)


def gone(model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(tensor_of(model, UP))


def twice(model: onnx.ModelProto) -> None:
    other = model.graph.initializer.add()
    other.CopyFrom(tensor_of(model, UP))
    other.dims[:] = [1]


def scales(model: onnx.ModelProto) -> None:
    """A quantised tensor without its scales."""
    model.graph.initializer.remove(tensor_of(model, f"{UP}.scales"))


def scales_of(*shape: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = tensor_of(model, f"{UP}.scales")
        tensor.dims[:] = shape
        place("length", str(4 * int(np.prod(shape))), f"{UP}.scales")(model)

    return change


def packed_of(*shape: int) -> Change:
    return dims(*shape, length=int(np.prod(shape)))


def bits(name: str, value: int) -> Change:
    """An attribute of the product that reads the quantised tensor."""

    def change(model: onnx.ModelProto) -> None:
        (node,) = [node for node in model.graph.node if f"{UP}.packed" in node.input]
        (found,) = [a for a in node.attribute if a.name == name]
        found.i = value

    return change


def tiers(name: str, values: Any) -> Change:
    return lambda model: set_attribute(model, name, np.asarray(values))


def external_tiers(model: onnx.ModelProto) -> None:
    """An attribute that says its bytes lie in a file of the system's."""
    (found,) = [a for a in call_of(model).attribute if a.name == "tier_lengths"]
    found.t.ClearField("raw_data")
    found.t.data_location = TensorProto.EXTERNAL
    found.t.external_data.add(key="location", value="../../../../../../etc/passwd")


def short_attribute(model: onnx.ModelProto) -> None:
    """Fewer bytes than its shape says."""
    (found,) = [a for a in call_of(model).attribute if a.name == "attention_factors"]
    found.t.dims[:] = [2**40]


def other_kind(model: onnx.ModelProto) -> None:
    (found,) = [a for a in call_of(model).attribute if a.name == "tier_lengths"]
    found.t.data_type = 99


def string_tiers(model: onnx.ModelProto) -> None:
    set_attribute(model, "tier_lengths", np.array(["a", "b", "c"], dtype=object))


def no_call(model: onnx.ModelProto) -> None:
    model.graph.node.remove(call_of(model))


def no_function(model: onnx.ModelProto) -> None:
    del model.functions[:]


def many_tiers(model: onnx.ModelProto) -> None:
    for name in ("tier_lengths", "start_tokens", "attention_factors", "scaled_inverse_frequencies"):
        set_attribute(model, name, np.repeat(attribute(model, name), 3000, axis=0))


PLACES: dict[str, Change] = {
    "location above the folder": place("location", "../config.json"),
    "location far above": place("location", "../../../../../../etc/passwd"),
    "absolute location": place("location", "/etc/passwd"),
    "location of a folder": place("location", "."),
    "location of the folder above": place("location", ".."),
    "location with a backslash": place("location", "..\\model.onnx_data"),
    "empty location": place("location", ""),
    "location with a zero": place("location", "a\0b"),
    "location that is too long": place("location", "x" * 5000),
    "location of nothing": place("location", "model.onnx_data_7"),
    "no location": without_place("location"),
    "offset beyond the file": place("offset", "99999999"),
    "offset beyond any file": place("offset", "9" * 30),
    "offset of five thousand digits": place("offset", "9" * 5000),
    "negative offset": place("offset", "-4096"),
    "odd offset": place("offset", "one"),
    "no length": without_place("length"),
    "length zero": place("length", "0"),
    "negative length": place("length", "-1"),
    "length beyond the file": place("length", "99999999999"),
    "huge shape": dims(2**31, 2**31),
    "shape that overflows": dims(2**62, 4, length=0),
    "shape that overflows to itself": dims(2**32, 2**32, length=0),
    "negative shape": dims(-32, -32),
    "shape of nothing": dims(0, 32, length=0),
    "no shape": dims(length=4),
    "one dimension more": dims(32, 32, 1),
    "another dtype": kind(TensorProto.FLOAT16),
    "doubles": kind(TensorProto.DOUBLE),
    "strings": kind(TensorProto.STRING),
    "bytes for floats": as_bytes,
    "a dtype that nobody has": kind(99),
    "weights in the graph": inline,
    "a tensor less": gone,
    "a tensor twice": twice,
}
PACKS: dict[str, Change] = {
    "no scales": scales,
    "scales of another shape": scales_of(3),
    "scales of no shape": scales_of(),
    "scales of more rows": scales_of(32, 2),
    "packed of another shape": packed_of(32, 16),
    "packed of no shape": packed_of(),
    "packed of fewer bytes": packed_of(32, 1, 8),
    "packed of four dimensions": packed_of(2, 16, 1, 16),
    "three bits": bits("bits", 3),
    "eight bits": bits("bits", 8),
    "no bits": bits("bits", 0),
    "negative bits": bits("bits", -4),
    "a thousand bits": bits("bits", 1000),
    "blocks of none": bits("block_size", 0),
    "blocks of others": bits("block_size", 64),
    "negative blocks": bits("block_size", -32),
    "columns of none": bits("K", 0),
    "more columns than there are": bits("K", 2**40),
    "negative columns": bits("K", -32),
}
TIERS: dict[str, Change] = {
    "lengths without an end": tiers("tier_lengths", [64.0, 128.0, np.inf]),
    "lengths that are no numbers": tiers("tier_lengths", [64.0, 128.0, np.nan]),
    "negative lengths": tiers("tier_lengths", [-64, -128, -256]),
    "no lengths": tiers("tier_lengths", np.zeros(0, np.int64)),
    "one length": tiers("tier_lengths", np.array(64)),
    "more lengths than sets": tiers("tier_lengths", [64, 128, 256, 512]),
    "complex lengths": tiers("tier_lengths", np.array([64j, 128j, 256j])),
    "words for lengths": string_tiers,
    "factors without an end": tiers("scaled_inverse_frequencies", np.full((3, 8), np.inf)),
    "factors of zero": tiers("scaled_inverse_frequencies", np.zeros((3, 8))),
    "no factors": tiers("scaled_inverse_frequencies", np.zeros((3, 0))),
    "fewer factors": tiers("scaled_inverse_frequencies", np.ones((3, 4))),
    "one frequency": tiers("inverse_frequencies", np.ones(1)),
    "no frequencies": tiers("inverse_frequencies", np.zeros(8)),
    "a table of attention factors": tiers("attention_factors", np.ones((3, 3))),
    "attention factors that are no numbers": tiers("attention_factors", [np.nan] * 3),
    "start tokens beyond all": tiers("start_tokens", [2**62] * 3),
    "attributes in a file": external_tiers,
    "an attribute without its bytes": short_attribute,
    "an attribute of a kind that nobody has": other_kind,
    "no call": no_call,
    "no function": no_function,
    "nine thousand tiers": many_tiers,
}
NAMED = [
    *(("f32", name, change) for name, change in PLACES.items()),
    *(("int4", name, change) for name, change in (PLACES | PACKS).items()),
    *(("f32", name, change) for name, change in TIERS.items()),
    *(("tables", name, change) for name, change in TIERS.items()),
]
# Not what lrconvert writes, but all that is read of it is whole.
HARMLESS = {"a tensor twice", "start tokens beyond all", "attention factors that are no numbers", "no function",
            "nine thousand tiers", "eight bits", "location of the folder above"}  # fmt: skip


@pytest.mark.parametrize(("base", "name", "change"), NAMED, ids=[f"{base}-{name}" for base, name, _ in NAMED])
def test_every_damage_with_a_name(
    bases: dict[str, Base], base: str, name: str, change: Change, options: Options
) -> None:
    """`inspect` and reading end with one line of ours or work; `verify` never passes."""
    it = bases[base]
    model = graph_of(it.folder)
    change(model)
    try:
        (it.folder / GRAPH).write_bytes(model.SerializeToString())
        _, read = look(it.folder)
        code = exit_code(it, options)
    finally:
        it.restore()
    assert code in (3, 4, 5)
    if name in PLACES and name not in HARMLESS:
        assert read == 3, "what is read is not what is described"


def test_the_healthy_folders_pass(bases: dict[str, Base], options: Options) -> None:
    """The control: with nothing damaged, all of it works."""
    for base in bases.values():
        assert look(base.folder) == (0, 0)
        assert exit_code(base, options) == 0


@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_cut_graph(bases: dict[str, Base], left: int, options: Options) -> None:
    """Anywhere: protobuf reads what is whole, and the rest is missed."""
    base = bases["f32"]
    try:
        (base.folder / GRAPH).write_bytes(base.graph[:left])
        assert look(base.folder)[1] == 3
        assert exit_code(base, options) in (3, 5)
    finally:
        base.restore()


@pytest.mark.parametrize("what", ["folder", "pipe", "gone", "zeros", "text"])
def test_a_graph_that_is_none(bases: dict[str, Base], what: str, tmp_path: Path, at_once: None) -> None:
    """Whatever stands in its place: answered, and at once."""
    folder = tmp_path / "a"
    shutil.copytree(bases["f32"].folder, folder)
    path = folder / GRAPH
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "zeros":
        path.write_bytes(bytes(4096))
    elif what == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert answer("inspect", folder)[0] == 3
    with pytest.raises(LrconvertError) as caught:
        open_model(folder)
    assert caught.value.exit_code == 3


def test_data_that_is_a_pipe_is_not_waited_for(bases: dict[str, Base], tmp_path: Path, at_once: None) -> None:
    folder = tmp_path / "a"
    shutil.copytree(bases["f32"].folder, folder)
    (folder / DATA).unlink()
    os.mkfifo(folder / DATA)
    assert look(folder) == (3, 3)


def foreign(folder: Path, half: int, table: bool = False) -> Path:
    """A graph that rotates, by somebody else."""
    folder.joinpath("onnx").mkdir(parents=True)
    shape = (2**12, half) if table else (half,)
    weights = numpy_helper.from_array(np.ones(shape, np.float32), "inv_freq")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "inv_freq"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", half])],
        [weights],
    )
    (folder / GRAPH).write_bytes(helper.make_model(graph).SerializeToString())
    return folder


@pytest.mark.parametrize("config", [True, False])
def test_a_graph_of_somebody_else(bases: dict[str, Base], config: bool, tmp_path: Path) -> None:
    """`inspect` looks at it and says so; as a source, and as an artifact to verify, it is refused with a way out."""
    folder = foreign(tmp_path / "theirs", 8)
    base = bases["f32"]
    if config:
        shutil.copy(base.source / "config.json", folder)
    assert answer("inspect", folder)[0] == 0
    code, said = answer(*command(folder, base.recipe, tmp_path / "o"))
    assert code == 3 and not (tmp_path / "o").exists()
    assert ("not written by lrconvert" if config else "config.json: can't be read") in said
    code, _ = answer("verify", folder, "--against", base.source, "--recipe", base.recipe)
    assert code == 3


@pytest.mark.parametrize(
    "dims", [(2**40, 8), (8,), (-1, -8), (2, 8), (2**62, 4), (2**31, 2**31, 2**31), (1, 8), (0, 8)]
)
@pytest.mark.parametrize("where", ["", "data", "../config.json", "/etc/passwd", "x" * 5000, "a\0b"])
def test_constants_of_somebody_else_of_any_shape(
    bases: dict[str, Base], dims: tuple[int, ...], where: str, tmp_path: Path
) -> None:
    """Looked at as far as they go, inline or in a file, and never outside of the folder."""
    folder = foreign(tmp_path / "theirs", 8)
    shutil.copy(bases["f32"].source / "config.json", folder)
    (folder / "onnx" / "data").write_bytes(bytes(48))
    model = graph_of(folder)
    tensor = model.graph.initializer[0]
    tensor.dims[:] = dims
    if where:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=where)
        tensor.external_data.add(key="offset", value="32")
    (folder / GRAPH).write_bytes(model.SerializeToString())
    assert answer("inspect", folder)[0] == 0


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"model_type": "llama"}', '{"model_type": "gpt2"}', "[" * 9999])
def test_a_config_that_is_none(bases: dict[str, Base], text: str, tmp_path: Path, options: Options) -> None:
    """Refused by everything that needs it; verify uses the source's."""
    folder = tmp_path / "a"
    shutil.copytree(bases["f32"].folder, folder)
    (folder / "config.json").write_text(text)
    looked, read = look(folder)
    assert looked in (3, 4) and read in (3, 4)
    base = bases["f32"]
    assert exit_code(Base(folder, b"", base.source, base.recipe), options) in (0, 3, 4, 5)


def test_a_sparse_graph_is_refused_before_it_is_read(bases: dict[str, Base], tmp_path: Path) -> None:
    """Terabytes of zeros cost nothing on a disk."""
    folder = tmp_path / "a"
    shutil.copytree(bases["f32"].folder, folder)
    os.truncate(folder / GRAPH, 2**40)
    with bounded():
        assert look(folder) == (3, 3)


def test_huge_tensors_in_a_sparse_file_are_not_believed(bases: dict[str, Base], tmp_path: Path) -> None:
    """A data file that has the bytes, a shape that the config does not have."""
    folder = tmp_path / "a"
    shutil.copytree(bases["f32"].folder, folder)
    os.truncate(folder / DATA, 2**40)
    model = graph_of(folder)
    dims(2**18, 2**18, length=2**38)(model)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    with bounded():
        assert look(folder) == (3, 3)


# --- damage without a name -------------------------------------------------------------------------------


@st.composite
def flips(draw: st.DrawFn, size: int) -> list[tuple[str, int, bytes]]:
    """Up to six places with other bytes, cut out, or repeated."""
    places = st.integers(0, size - 1)
    kinds = st.sampled_from(["set", "set", "set", "flip", "insert", "remove", "cut"])
    texts = st.one_of(
        st.binary(min_size=1, max_size=4),
        st.sampled_from([b"\xff" * 9, b"\x80\x80\x80\x80\x10", b"\x00", b"../", b"-1"]),
    )
    return draw(st.lists(st.tuples(kinds, places, texts), min_size=1, max_size=6))


def flipped(data: bytes, injuries: list[tuple[str, int, bytes]]) -> bytes:
    made = bytearray(data)
    for what, where, text in injuries:
        where = min(where, max(0, len(made) - 1))
        if what == "set":
            made[where : where + len(text)] = text
        elif what == "flip" and made:
            made[where] ^= 1 << (text[0] % 8)
        elif what == "insert":
            made[where:where] = text
        elif what == "remove":
            del made[where : where + len(text)]
        elif what == "cut" and text[0] < 32:
            del made[where:]
    return bytes(made)


def attack(base: Base, count: int, check: Callable[[], tuple[int, int]]) -> None:
    """`count` graphs, always the same; some have to get through and some not, or nothing was tested."""
    found: dict[tuple[int, int], int] = {}

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=SLOW_CHECKS)
    @given(injuries=flips(len(base.graph)))
    def attempt(injuries: list[tuple[str, int, bytes]]) -> None:
        (base.folder / GRAPH).write_bytes(flipped(base.graph, injuries))
        codes = check()
        found[codes] = found.get(codes, 0) + 1

    try:
        attempt()
    finally:
        base.restore()
    assert sum(found.values()) >= count
    assert len(found) > 1, found


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_graph_is_refused_or_serves(bases: dict[str, Base], kind: str) -> None:
    """Hundreds of graphs: one line and exit code 3 or 4, or tensors of the right shapes."""
    attack(bases[kind], QUICK // len(KINDS), lambda: look(bases[kind].folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_damaged_graphs_are_refused_or_serve(bases: dict[str, Base], kind: str) -> None:
    """The same, as often as LRCONVERT_MUTATIONS says."""
    attack(bases[kind], MANY // len(KINDS), lambda: look(bases[kind].folder))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_graph_is_verified_or_refused(bases: dict[str, Base], kind: str, options: Options) -> None:
    """By ONNX Runtime too, in a process of its own that has to survive: a report, or one of our errors."""
    attack(bases[kind], QUICK // 20, lambda: (exit_code(bases[kind], options), 0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_graphs_are_verified_or_refused(
    bases: dict[str, Base], kind: str, options: Options
) -> None:
    """The same, for a thirtieth of LRCONVERT_MUTATIONS."""
    attack(bases[kind], MANY // 30 // len(KINDS), lambda: (exit_code(bases[kind], options), 0))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails where Python and NumPy hold more than `MEMORY` at once."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] - before < MEMORY
    finally:
        tracemalloc.stop()


def test_a_damaged_graph_takes_no_more_memory_than_a_good_one(bases: dict[str, Base]) -> None:
    """Counts and shapes of any size are believed only as far as the files go."""

    def check() -> tuple[int, int]:
        with bounded():
            return look(bases["int4"].folder)

    attack(bases["int4"], QUICK // 10, check)
