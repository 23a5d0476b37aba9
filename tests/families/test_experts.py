# SPDX-License-Identifier: Apache-2.0
"""Experts: as transformers computes them, in every format, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_shape
import numpy as np
import pytest
from conftest import Result, recipe_for
from support.float64 import EXACT, by_reference, natively
from support.gguf_files import Tensors, changed, contents, write_matrix
from support.gguf_pico import make_pico
from support.pico import pico_config, pico_tensors, write_pico
from support.verifying import WORKERS, baked, options_by_target, verify

from lrconvert.checkpoint import Model, open_model
from lrconvert.checkpoint.names import RenamedCheckpoint
from lrconvert.errors import InputError, UnsupportedError
from lrconvert.families import get_family, read_shape
from lrconvert.families.experts import Experts
from lrconvert.parity import Options
from lrconvert.parity.judging import CLOSEST
from lrconvert.parity.measures import compare
from lrconvert.parity.mutants import no_attention_factor, swapped_sets
from lrconvert.recipe import Recipe
from lrconvert.recipe.models import own_recipe
from lrconvert.reference import FactorSet, Reference, Rotation
from lrconvert.runtimes import llama_cpp
from lrconvert.targets import hf, onnx
from lrconvert.targets.gguf.schemes import SCHEMES, MixFacts, tensor_type

pytestmark = pytest.mark.usefixtures("remembered")

pytest.importorskip("torch", reason="needs lrconvert[hf]")
pytest.importorskip("transformers", reason="needs lrconvert[hf]")

WINDOW = 256  # llama.cpp's contexts count in steps of it
FAR = 100
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}
Pico = Callable[..., Model]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": None}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}),
    ("qwen3_moe", {"num_experts_per_tok": 8, "moe_intermediate_size": 96}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "tie_word_embeddings": True, "shared_expert_intermediate_size": 160}),
    ("phimoe", {}),
    ("phimoe", {"attention_bias": False, "lm_head_bias": False, "num_local_experts": 16}),
    ("phimoe", {"router_jitter_noise": 0.4, "num_local_experts": 8}),  # several are near the best
]


@pytest.fixture(scope="module")
def options() -> Iterator[Callable[[str], Options]]:
    with options_by_target() as get:
        yield get


def model_of(pico: Pico, family: str, **changes: Any) -> Model:
    original = {"original_max_position_embeddings": WINDOW} if family == "phimoe" else {}
    return pico(family, max_position_embeddings=WINDOW, **original, **changes)


# --- the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
def test_experts_are_what_transformers_computes(
    pico_folder: Callable[..., Path], family: str, changes: dict[str, Any]
) -> None:
    folder = pico_folder(family, **changes)
    assert np.abs(by_reference(open_model(folder)) - natively(folder)).max() <= EXACT


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"used": 1}),
        ("mixtral", {"used": 3}),
        ("mixtral", {"normalised": False}),
        ("qwen3_moe", {"normalised": False}),
        ("mixtral", {"gating": "sparsemixer", "jitter": 0.01}),
        ("qwen2_moe", {"shared": 0}),
        ("qwen2_moe", {"normalised": True}),
        ("phimoe", {"jitter": 0.4}),
        ("phimoe", {"gating": "softmax"}),
    ],
    ids=str,
)
def test_other_gates_are_far_off(pico_folder: Callable[..., Path], family: str, changes: dict[str, Any]) -> None:
    """What the bound above would say of a router that chooses or weighs otherwise."""
    folder = pico_folder(family)
    model = open_model(folder)
    assert isinstance(model.shape.experts, Experts)
    wrong = replace(model, shape=replace(model.shape, experts=replace(model.shape.experts, **changes)))
    assert np.abs(by_reference(wrong) - natively(folder)).max() > 1e6 * EXACT


def test_a_layer_norm_is_no_rms_norm(pico_folder: Callable[..., Path]) -> None:
    folder = pico_folder("phimoe")
    model = open_model(folder)
    wrong = replace(model, shape=replace(model.shape, norm="rms"))
    assert np.abs(by_reference(wrong) - natively(folder)).max() > 1e6 * EXACT


# --- artifacts -------------------------------------------------------------------------------------------


def exchanged(model: Model, one: str, other: str) -> Model:
    """The model as a converter leaves it that takes one tensor for another, in every layer."""
    names = {name: name for name in model.checkpoint.tensors}
    for name in names:
        for here, there in ((one, other), (other, one)):
            if here in name:
                names[name] = name.replace(here, there)
    return replace(model, checkpoint=RenamedCheckpoint(model.checkpoint, names))


MISTAKES = {"mixtral": [(".w1.", ".w3."), (".experts.0.", ".experts.1.")], "phimoe": [(".experts.0.", ".experts.3.")]}


@pytest.mark.parametrize(
    ("family", "target"), [("mixtral", "hf"), ("mixtral", "gguf"), ("mixtral", "onnx"), ("phimoe", "onnx")]
)
def test_exchanged_experts_are_caught(
    pico: Pico, tmp_path: Path, family: str, target: str, options: Callable[[str], Options]
) -> None:
    """Gate for up, one expert for another: by the weights where the file's own are what code is compared on, else by
    all code, far outside of its tolerance."""
    model = model_of(pico, family)
    recipe = recipe_for(model, even=True)
    for number, mistake in enumerate(MISTAKES[family]):
        artifact = baked(target, exchanged(model, *mistake), recipe, tmp_path / str(number))
        report = verify(artifact, against=model.reference, recipe=recipe, options=options(target))
        for code in ("native", "custom") if target == "hf" else ("weights",):
            caught = [row for row in report.failed if row.code == code]
            assert caught, f"{mistake} passed in {code}"
            assert target != "hf" or max((row.kl_mean or 0) / (row.bound or 1) for row in caught) > FAR


TYPES: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral", "onnx", {"dtype": "int8"}),
    ("qwen3_moe", "onnx", {"dtype": "int4", "attention": "standard"}),
    ("qwen2_moe", "onnx", {"dtype": "int8"}),
    ("qwen2_moe", "hf", {"dtype": "bf16"}),
    ("phimoe", "onnx", {"dtype": "f16"}),
    ("phimoe", "hf", {"dtype": "bf16"}),
    ("mixtral", "gguf", {"type": "q8_0"}),
    ("mixtral", "gguf", {"type": "q4_k_m", "static": True}),
]


@pytest.mark.parametrize(("family", "target", "more"), TYPES, ids=str)
def test_other_types_are_right_too(
    pico: Pico, tmp_path: Path, family: str, target: str, more: dict[str, Any], options: Callable[[str], Options]
) -> None:
    model = model_of(pico, family)
    report = verify(baked(target, model, recipe_for(model, even=True), tmp_path, **more), options=options(target))
    assert report.passed, report.summary


@pytest.mark.parametrize("mutant", [swapped_sets, no_attention_factor])
@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_the_tokens_that_agree_best_show_a_mistake(
    pico: Pico,
    tmp_path: Path,
    family: str,
    mutant: Callable[[Recipe], Recipe | None],
    options: Callable[[str], Options],
) -> None:
    """In float16 rounding chooses other experts for some tokens, and the rest is judged: a wrong rotation moves it."""
    model = model_of(pico, family)
    recipe = recipe_for(model, even=True)
    wrong = mutant(recipe)
    assert wrong is not None
    artifact = baked("onnx", model, wrong, tmp_path, dtype="f16")
    report = verify(artifact, against=model.reference, recipe=recipe, options=options("onnx"))
    judged = [row for row in report.failed if row.code == "onnxruntime" and CLOSEST in row.basis]
    assert judged and max((row.kl_mean or 0) / (row.bound or 1) for row in judged) > 10


@pytest.mark.parametrize("target", WORKERS)
def test_a_gguf_is_a_source_like_any_other(
    pico: Pico, tmp_path: Path, target: str, options: Callable[[str], Options]
) -> None:
    """One tensor for a layer's experts there, one for each here; to the last bit, quantised ones too."""
    model = model_of(pico, "mixtral", tie_word_embeddings=True)
    recipe = recipe_for(model, even=True)
    again = open_model(baked("gguf", model, recipe, tmp_path))
    assert again.family.name == "mixtral" and again.shape.experts == model.shape.experts
    for tensor in model.roles.values():
        np.testing.assert_array_equal(again.checkpoint.read(tensor.name), model.checkpoint.read(tensor.name))
    report = verify(baked(target, again, recipe, tmp_path / "again"), options=options(target))
    assert report.passed, report.summary


def _squeeze(metadata: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if "ffn_gate_inp_shexp" in name]:
        kind, shape, data = tensors[name]
        tensors[name] = kind, shape[1:], data


@pytest.mark.parametrize("squeezed", [False, True])
def test_a_shared_expert_in_a_gguf(
    pico: Pico, tmp_path: Path, options: Callable[[str], Options], squeezed: bool
) -> None:
    """Read back to the last bit, also where its gate is a vector, as llama.cpp's own converter writes it."""
    model = pico("qwen2_moe", max_position_embeddings=4 * WINDOW, rope_scaling=YARN)
    recipe, _ = own_recipe(model)
    path = baked("gguf", model, recipe, tmp_path)
    if squeezed:
        changed(path, path, _squeeze)
    again = open_model(path)
    assert again.family.name == "qwen2_moe" and again.shape.experts == model.shape.experts
    for tensor in model.roles.values():
        np.testing.assert_array_equal(again.checkpoint.read(tensor.name), model.checkpoint.read(tensor.name))
    report = verify(baked("gguf", again, recipe, tmp_path / "again", type="q8_0"), options=options("gguf"))
    assert report.passed, report.summary


def test_a_quantised_gguf_keeps_its_bytes(pico: Pico, tmp_path: Path) -> None:
    """Baked again without a type, experts are copied as they are stored."""
    model = model_of(pico, "mixtral")
    recipe = recipe_for(model, even=True)
    first = open_model(baked("gguf", model, recipe, tmp_path / "one", type="q4_0"))
    second = open_model(baked("gguf", first, recipe, tmp_path / "two", type=None))
    name = next(tensor.name for tensor in model.roles.values() if tensor.role == "expert_down" and tensor.expert == 3)
    one, two = (each.checkpoint.encoded(name) for each in (first, second))
    assert one is not None and two is not None and one.type == two.type != "F32"
    np.testing.assert_array_equal(one.read(0, 64), two.read(0, 64))


def test_an_importance_matrix_has_a_row_for_every_expert(pico: Pico, tmp_path: Path) -> None:
    """What changes in one expert's row changes that expert's bytes, and no others."""
    model = model_of(pico, "mixtral", hidden_size=256, intermediate_size=256, head_dim=64)
    name, recipe, found = "blk.1.ffn_up_exps.weight", recipe_for(model, even=True), []
    rows = np.random.default_rng(2).random((4, 256)).astype(np.float32) + 0.01
    for number in range(2):
        rows[2] = rows[2][::-1] ** (1 + 2 * number)
        file = tmp_path / f"{number}.gguf"
        write_matrix(file, {f"{name}.in_sum2": rows, f"{name}.counts": np.ones((4, 1), np.float32)})
        artifact = baked("gguf", model, recipe, tmp_path / str(number), type="q4_k_s", imatrix=file)
        found.append(contents(artifact)[1][name])
    (kind, shape, one), (_, _, other) = found
    assert (kind.name, shape) == ("Q4_K", (4, 256, 256))
    parts = [slice(len(one) // 4 * expert, len(one) // 4 * (expert + 1)) for expert in range(4)]
    assert [one[part] == other[part] for part in parts] == [True, True, False, True]


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_yarn_of_qwen_moe_is_llama_cpps_own(
    pico: Pico, tmp_path: Path, options: Callable[[str], Options], family: str
) -> None:
    """Its architecture ignores factors; the YaRN of its card is right in short and long contexts."""
    model = pico(family, max_position_embeddings=4 * WINDOW, rope_scaling=YARN)
    recipe, _ = own_recipe(model)
    report = verify(baked("gguf", model, recipe, tmp_path), options=options("gguf"))
    assert report.passed, report.summary
    assert {"short", "far end"} <= {row.case for row in report.rows if row.verdict == "pass"}
    with pytest.raises(UnsupportedError, match=f"ignores rope factors for {family}"):
        baked("gguf", model, recipe_for(model, even=True), tmp_path / "other")


KEYS = [("q4_k_m", "Q8_0"), ("q2_k", "Q8_0"), ("f16", "F16"), ("q8_0", "Q8_0")]


@pytest.mark.parametrize(("scheme", "kind"), KEYS)
def test_types_of_experts_are_those_of_an_mlp(scheme: str, kind: str) -> None:
    """One tensor for all of a layer; the router stays as it is, since what it rounds decides which are used. As
    llama-quant.cpp has it, eight experts get finer keys and values."""
    for experts in (4, 8):
        facts = MixFacts("llama", 8, 8, 2, False, experts=experts)
        chosen, dense = SCHEMES[scheme], replace(facts, experts=0)
        for role in ("ffn_gate", "ffn_up", "ffn_down"):
            stacked = tensor_type(chosen, f"blk.3.{role}_exps.weight", (experts, 512, 512), facts)
            assert stacked == tensor_type(chosen, f"blk.3.{role}.weight", (512, 512), dense)
        assert tensor_type(chosen, "blk.3.ffn_gate_inp.weight", (experts, 512), facts).name == "F32"
        keys, plain = (tensor_type(chosen, "blk.3.attn_k.weight", (512, 512), each) for each in (facts, dense))
        assert keys.name == kind if experts == 8 else keys == plain


def test_a_whole_model_is_planned_without_its_bytes(tmp_path: Path) -> None:
    """Phi-3.5-MoE's true shape in files of holes: 41.9 billion parameters, and every size is exact."""
    config = make_shape.shape_config("phi-3.5-moe")
    make_shape.write_checkpoint(tmp_path / "m", config, make_shape.plan_shards(make_shape.planned(config)), None)
    model = open_model(tmp_path / "m")
    recipe = replace(recipe_for(model), tiers=recipe_for(model).tiers[:1])
    count = sum(math.prod(tensor.shape) for tensor in model.roles.values())
    assert count == 41_873_153_344
    folder = hf.plan(model, recipe, tmp_path / "a", hf.Options(dtype="f16"))
    assert sum(tensor.nbytes for stream in folder.streams for tensor in stream.tensors) == 2 * count
    graph = onnx.plan(model, recipe, tmp_path / "b", onnx.Options(dtype="f16"))
    assert sum(tensor.nbytes for stream in graph.streams for tensor in stream.tensors) >= 2 * count


# --- Phi-3.5-MoE -----------------------------------------------------------------------------------------


def test_both_attention_factors_are_in_the_config(pico: Pico, tmp_path: Path) -> None:
    """Under its own keys; and the long set, though transformers 5 never uses it: that is said, not dropped."""
    model = model_of(pico, "phimoe")
    recipe = recipe_for(model)
    plan = hf.plan(model, recipe, tmp_path / "a")
    assert plan.losses == [
        "transformers' native Phi-3.5-MoE code never uses the long factors: sequences of more than 256 tokens use "
        "those of 256"
    ]
    scaling = json.loads(plan.texts["config.json"])["rope_scaling"]
    tiers = recipe.tiers
    assert scaling["short_factor"] == list(tiers[0].factors) and scaling["long_factor"] == list(tiers[-1].factors)
    assert (scaling["short_mscale"], scaling["long_mscale"]) == tuple(tier.attention_factor for tier in tiers)
    assert tiers[0].attention_factor != tiers[-1].attention_factor and "attention_factor" not in scaling


def test_the_model_s_own_rotation_is_read(pico: Pico) -> None:
    """As published: both factors under their keys, which count whatever else a config says."""
    scaling = {
        "type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.5] * 8,
        "short_mscale": 1.1,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 64,
    }
    for more in ({}, {"attention_factor": 2.0}):
        found = pico("phimoe", max_position_embeddings=WINDOW, rope_scaling={**scaling, **more}).rotation
        assert [(tier.max_length, tier.attention_factor) for tier in found.tiers] == [(64, 1.1), (WINDOW, 1.3)]


def test_no_gguf_of_it_is_written(tmp_path: Path, cli: Callable[..., Result]) -> None:
    """llama.cpp has an architecture of that name, and it computes another model."""
    result = cli("gguf", write_pico(tmp_path / "m", "phimoe"), "-o", tmp_path / "m.gguf")
    assert result.code == 4 and "llama.cpp computes another model from a GGUF of phimoe: its phimoe" in result.err
    assert not (tmp_path / "m.gguf").exists()


def test_llama_cpps_phimoe_is_another_model(pico: Pico, tmp_path: Path, options: Callable[[str], Options]) -> None:
    """What the refusal says of it: with its norms and gates the reference answers the same, and with the own not."""
    model = model_of(pico, "phimoe")
    forced = replace(model, family=replace(model.family, gguf_differs=None, gguf_longrope="phimoe"))
    recipe = recipe_for(model, even=True)
    artifact = baked("gguf", forced, recipe, tmp_path)
    tokens = np.random.default_rng(5).integers(0, model.shape.vocab, size=WINDOW).tolist()
    spec = model.resolve(recipe)
    sets = [FactorSet(tier.max_length, tier.factors, 0, tier.attention_factor) for tier in spec.tiers]
    session: Any = llama_cpp.RUNTIME.backends[0].open(artifact, options("gguf"))
    (answer,) = session.logits([tokens], keep=list(range(WINDOW)), context=WINDOW)
    session.close()
    changed: dict[str, Any] = {"norm": "rms", "experts": Experts(4, 2, 48)}
    alone = [{key: value} for key, value in changed.items()]
    for changes, same in ((changed, True), *((other, False) for other in ({}, *alone))):
        other = replace(model, shape=replace(model.shape, **changes))
        wanted = Reference(other, Rotation(spec.base, spec.rotary_dim, sets)).logits(tokens)
        found = compare(wanted, answer).kl_mean
        assert found < 1e-6 if same else found > 1e-2, (changes, found)


def test_a_gguf_of_it_is_read(tmp_path: Path) -> None:
    """As others write it: with a head's bias, and without the jitter, which is the published model's then."""
    made = make_pico(tmp_path / "m.gguf", "phimoe", lm_head_bias=True, attention_bias=True, num_local_experts=4)
    model = open_model(made.path)
    assert model.checkpoint.config["lm_head_bias"] is True
    assert model.shape.experts == Experts(4, 2, 96, "sparsemixer", jitter=0.01)
    for name, values in made.weights.items():
        np.testing.assert_array_equal(model.checkpoint.read(name), values)


# --- bad input -------------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("mixtral", {"num_experts_per_tok": 5}, InputError, "num_experts_per_tok is 5; there are 4 experts"),
    ("mixtral", {"num_local_experts": 0}, InputError, "num_local_experts is 0; an integer from 1"),
    ("mixtral", {"num_local_experts": 2**20}, InputError, "num_local_experts is 1048576; at most 4096 are read"),
    ("phimoe", {"num_experts_per_tok": 3}, InputError, "num_experts_per_tok is 3 of 4; this family's router chooses 2"),
    ("phimoe", {"router_jitter_noise": 0}, InputError, "router_jitter_noise is 0; a positive number is needed"),
    ("qwen3_moe", {"norm_topk_prob": 1}, InputError, "norm_topk_prob is 1; true or false is needed"),
    ("qwen3_moe", {"num_local_experts": 4}, InputError, "num_experts is 8 and num_local_experts 4; they contradict"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, UnsupportedError, "mlp_only_layers [0]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, UnsupportedError, "decoder_sparse_step 2"),
    (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 0},
        InputError,
        "shared_expert_intermediate_size is 0; an integer",
    ),
    ("qwen2_moe", {"use_sliding_window": True}, InputError, "use_sliding_window is true; versions of transformers"),
    ("llama", {"num_local_experts": 8}, UnsupportedError, "num_local_experts 8"),
    ("mixtral", {"shared_expert_intermediate_size": 64, "n_routed_experts": 8}, UnsupportedError, "n_routed_experts 8"),
]


@pytest.mark.parametrize(("family", "changes", "error", "message"), BAD, ids=[row[3] for row in BAD])
def test_numbers_that_mean_nothing_are_refused(
    family: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        read_shape({**pico_config(family), **changes}, get_family(family))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("count", "gone", "message"),
    [
        (5, None, "missing tensors: model.layers.0.block_sparse_moe.gate.weight has|missing tensors: .*experts.4.w1"),
        (3, None, "tensors that mixtral does not have: .*experts.3.w1.weight"),
        (4, "model.layers.1.block_sparse_moe.gate.weight", "missing tensors: .*layers.1.block_sparse_moe.gate.weight"),
        (4, "model.layers.0.block_sparse_moe.experts.2.w3.weight", "missing tensors: .*experts.2.w3.weight"),
        (8, "model.layers.1.mlp.shared_expert_gate.weight", "missing tensors: model.layers.1.mlp.shared_expert_gate"),
    ],
)
def test_experts_that_are_not_there_are_named(tmp_path: Path, count: int, gone: str | None, message: str) -> None:
    """A count that disagrees with the tensors, a router or a shared expert's gate that was left out."""
    from safetensors.numpy import save_file

    config = pico_config("qwen2_moe" if "shared" in message else "mixtral")
    weights = {name: values for name, values in pico_tensors(config).items() if name != gone}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": count}))
    with pytest.raises(InputError, match=message):
        open_model(tmp_path)


def test_gates_that_llama_cpp_computes_otherwise_are_refused(pico: Pico, tmp_path: Path) -> None:
    """qwen2moe leaves them as the softmax makes them, qwen3moe divides by their sum."""
    for family, sums, words in (
        ("qwen2_moe", True, "sum to one .*qwen2moe leaves them as they are"),
        ("qwen3_moe", False, "don't sum to one .*qwen3moe divides them by their sum"),
    ):
        model = pico(family, max_position_embeddings=4 * WINDOW, rope_scaling=YARN, norm_topk_prob=sums)
        with pytest.raises(UnsupportedError, match=words):
            baked("gguf", model, own_recipe(model)[0], tmp_path)
