# SPDX-License-Identifier: Apache-2.0
"""Healthy files of every kind that lrconvert reads (`make_world`), and who reads each (`READERS`).

Everything is named relative to the world's folder, in which the calls are made.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import recipe_for
from gguf import GGUFWriter
from support.gguf_files import converter_gguf
from support.onnx_files import write_adapter
from support.pico import write_pico
from support.quantised import write_quantised
from support.search_helpers import small_space
from support.vocabularies import SPM_SPECIALS, STYLES, spm, spm_pieces
from tokenizers import normalizers

from fuzzing.hunting import Call, Reader, Target
from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import open_model
from lrconvert.evals.earlier import read_earlier
from lrconvert.evals.passkey import PasskeyFormat
from lrconvert.evals.tasks import BENCHMARKS, read_lines
from lrconvert.evals.texts import read_texts
from lrconvert.extending.plan import load_plan
from lrconvert.extending.problems import problems
from lrconvert.extending.run import Finished
from lrconvert.parity.lock import Lock, check_lock
from lrconvert.recipe import write_recipe
from lrconvert.searching.journal import Journal, Record, read_journal
from lrconvert.searching.protocol import Answer, Question
from lrconvert.targets import gguf, hf, onnx
from lrconvert.targets.gguf.imatrix import Imatrix
from lrconvert.targets.gguf.sentencepiece import BYTES
from lrconvert.training.keys import LabelledForm

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256}  # fmt: skip
LAYOUTS = ("gptq-4", "awq", "ct-int4", "fp8-block-128", "bnb-nf4-double")

# --- the healthy files -----------------------------------------------------------------------------------


def make_world(folder: Path) -> Path:
    """Every healthy file, in a new folder."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        _models()
        _artifacts()
        _beside_models()
        _of_searches()
        _of_evaluations()
    (folder.parent / "outside").mkdir(exist_ok=True)
    (folder.parent / "outside" / "secret.txt").write_text("secret")
    return folder


def _models() -> None:
    tokenizer = STYLES["gpt-2"].tokenizer()
    rows = tokenizer.get_vocab_size() + 5
    write_pico(Path("model"), **SMALL, vocab_size=rows, bos_token_id=0, eos_token_id=1)
    tokenizer.save("model/tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>", "bos_token": "<|endoftext|>",
                "chat_template": "{{ messages }}", "model_max_length": 256, "added_tokens_decoder": {}}  # fmt: skip
    _write("model/tokenizer_config.json", settings)
    _write("model/special_tokens_map.json", {"eos_token": "<|eot_id|>", "bos_token": {"content": "<|endoftext|>"}})
    _write("model/added_tokens.json", {"<tool>": rows - 6})
    Path("model/LICENSE").write_text("Apache License\n")
    write_pico(Path("sharded"), **SMALL, vocab_size=40, shards=2)
    for layout in LAYOUTS:
        write_quantised(Path(layout), layout, num_hidden_layers=1)
    pieces = [*SPM_SPECIALS, *BYTES, *spm_pieces()]
    write_pico(Path("spm"), **SMALL, vocab_size=len(pieces) + 5)
    legacy = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spm(legacy).save("spm/tokenizer.json")
    write_pico(Path("pieces"), **SMALL, vocab_size=len(pieces) + 5)
    Path("pieces/tokenizer.model").write_bytes(_sentencepiece(pieces))
    for folder in ("spm", "pieces"):
        _write(f"{folder}/tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})


def _sentencepiece(pieces: list[str]) -> bytes:
    """A tokenizer.model of these pieces: field 1 of ModelProto, with text (1), score (2) and type (3)."""
    made = b""
    for index, piece in enumerate(pieces):
        text, kind = piece.encode(), 2 if index == 0 else 3 if index < 3 else 6 if piece in BYTES else 1
        entry = b"\x0a" + bytes([len(text)]) + text + b"\x15" + np.float32(-index).tobytes() + bytes([0x18, kind])
        made += b"\x0a" + bytes([len(entry)]) + entry
    return made + b"\x12\x05\x18\x02\x98\x02\x01"  # trainer_spec: model_type BPE, byte_fallback


def _artifacts() -> None:
    model = open_model("model")
    recipe = recipe_for(model, even=True)
    write_recipe(recipe, Path("recipe"))
    bake(hf.plan(model, recipe, Path("a")), link=False)
    bake(gguf.plan(model, recipe, Path("m.gguf"), gguf.Options(type="f32", modelfile=True)))
    bake(onnx.plan(model, recipe, Path("o")))
    bake(onnx.plan(model, recipe, Path("o4"), onnx.Options(dtype="int4")))
    converter_gguf(Path("theirs.gguf"), open_model("sharded"), edit=lambda writer: writer.add_token_list(["a"] * 40))


def _beside_models() -> None:
    modules = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.0.mlp.down_proj": (32, 32)}
    write_adapter(Path("adapter"), modules)
    writer = GGUFWriter("matrix.gguf", "llama")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 125)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight"):
        writer.add_tensor(f"{name}.in_sum2", np.ones((1, 32), np.float32))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 125, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path("4k_table.csv").write_text("\n".join([",".join(f"{1 + 0.5 * i:.2f}" for i in range(8))] * 3))
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)], "rotary_dim": 16, "head_dim": 16,
               "original_max_position_embeddings": 256, "max_position_embeddings": 512, "rope_theta": 10000.0,
               "attention_factor": {"short_mscale": 1.0, "long_mscale": 1.1}, "model": "me/m", "start_tokens": 0,
               "source": {"repo": "me/m", "ref": "main", "path": "config.json", "licence": "mit"}}  # fmt: skip
    _write("factors.json", factors)


def _of_searches() -> None:
    seeds = [candidate for _, candidate in small_space().seeds()]
    records = [
        Record(512, Question(seeds[0], "pi"), Answer(3.25, {"text@512": 3.25}, seconds=1.5)),
        Record(512, Question(seeds[1], "gradient", True), Answer(3.1, {}, (0.1,) * 8, seconds=2.0)),
        Record(512, Question(seeds[2], "yarn"), Answer.failed("the loss is not a number")),
    ]
    with Journal.open(Path("chained.jsonl"), IDENTITY) as journal:
        journal.begin({"device": "cpu"})
        for record in records:
            journal.append(record)
    lines = [json.loads(line) for line in Path("chained.jsonl").read_text().splitlines()]
    kept = ({key: item for key, item in line.items() if key != "chain"} for line in lines)  # as earlier versions wrote
    Path("journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    Path("plan.toml").write_text(PLAN)
    stage = {"name": "1-derive", "digest": "0" * 64, "facts": {"a": 1.0}, "seconds": 1.0, "memory": None, "files": {}}
    Path("stage").mkdir()
    _write("stage/result.json", stage)


IDENTITY = {"seed": 0, "texts": [{"name": "a.txt", "sha256": "00"}], "weights": {"512": 1.0}}
PLAN = """
name = "small"
[[stage]]
kind = "derive"
window = "1k"
[[stage]]
kind = "search"
window = 2048
budget = 4
row_length = 512
jumps = [1, 4]
[[stage]]
kind = "tune"
window = "2k"
length = "1k"
steps = 2
rate = 1e-3
[[stage]]
kind = "recover"
[[stage]]
kind = "calibrate"
lengths = [256, "2k"]
[[stage]]
kind = "evaluate"
perplexity = [256, "1k"]
retrieval = [512]
"""


def _of_evaluations() -> None:
    row = {"task": "arc", "metric": "acc", "shots": 0, "questions": 3, "scores": "1 0 0.5", "prompts_sha256": "0" * 64}
    _write(
        "earlier.json",
        {"evaluation": "benchmarks", "artifact": "a", "seed": 0, "files": {"x": "0"}, "truncated": 0, "rows": [row]},
    )
    value = {
        "code": "custom",
        "case": "64 tokens",
        "verdict": "pass",
        "length": 64,
        "kl_mean": 1e-9,
        "kl_max": 1e-8,
        "bound": 1e-6,
    }
    _write(
        "verify.lock",
        {"lock_version": 1, "settings": {"profile": "full"}, "versions": {"numpy": "2"}, "values": [value]},
    )
    form = {
        "filler": ["The grass is green."],
        "needle": "The key is {key}.",
        "question": "What is the key? ",
        "key_digits": 5,
        "labels": ["amber", "blue"],
        "labelled_needle": "The number for {label} is {key}.",
    }
    _write("passkey.json", form)
    np.save("ids.npy", np.arange(64, dtype=np.int64) % 40)
    Path("text.txt").write_text("The world is wide.\n" * 20)
    for name, lines in QUESTIONS.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "arc_challenge": [{"question": "Why?", "choices": ["x", "y"], "labels": ["A", "B"], "answer": "A"}] * 2,
    "hellaswag": [{"context": "He ran. then", "endings": ["a [x]", "b"], "label": 0}] * 2,
    "truthfulqa_mc2": [{"question": "Why?", "correct": ["a"], "incorrect": ["b", "c"]}] * 2,
}


def _write(name: str, value: Any) -> None:
    Path(name).write_text(json.dumps(value))


# --- who reads them --------------------------------------------------------------------------------------


def artifact_calls(name: str) -> tuple[Call, ...]:
    return (
        ("inspect", name),
        ("inspect", name, "--json"),
        ("verify", name, "--files-only"),
        ("verify", name, "--files-only", "--json"),
        ("push", name, "me/x", "--dry-run"),
        ("push", name, "me/x", "--dry-run", "--force"),
    )


def baking(model: str, *more: str) -> tuple[Call, ...]:
    """Every format, made of a model."""
    return (
        ("inspect", model),
        ("inspect", model, "--json"),
        ("hf", model, "--recipe", "recipe", "-o", "new", *more),
        ("hf", model, "--recipe", "recipe", "--dtype", "bf16", "-o", "new", *more),
        ("gguf", model, "--recipe", "recipe", "-o", "new.gguf", "--allow-lossy", *more),
        ("gguf", model, "--recipe", "recipe", "-o", "new.gguf", "--allow-lossy", "--type", "q8_0", *more),
        ("onnx", model, "--recipe", "recipe", "-o", "new", *more),
        ("hf", model, "--recipe", "recipe", "-o", "new", "--dry-run", *more),
    )


def read_search_journal() -> Any:
    found = read_journal(Path("journal.jsonl"))
    return found.head, found.runs, [_finite(record) for record in found.records]


def _finite(record: Record) -> Any:
    """What a failed evaluation has is an infinite loss: nothing else may be."""
    values = record.to_json()
    if record.answer.error is None and values["loss"] is None:
        raise AssertionError("an evaluation without a loss, and without an error")
    return values


def go_on_with_journal() -> Any:
    with Journal.open(Path("journal.jsonl"), IDENTITY) as journal:
        journal.begin({"device": "cpu"})
        records = journal.found.records
    return [_finite(record) for record in records], read_search_journal()


def chained_journal() -> Any:
    return read_journal(Path("chained.jsonl")).head


def read_plan() -> Any:
    plan = load_plan("plan.toml")
    return plan, plan.names, problems(plan, 256), plan.up_to(min(plan.target, 1024))


def read_results() -> Any:
    found = read_earlier(Path("earlier.json"))
    return found.model_dump()


def read_lock() -> Any:
    return Lock.read(Path("verify.lock")), check_lock(Path("verify.lock"), {"profile": "full"})


def read_matrix() -> Any:
    found = Imatrix.load(Path("matrix.gguf"))
    return found.facts, dict(found.means), found.weights("blk.0.attn_q.weight", 32)


def read_stage() -> Any:
    return Finished.read(Path("stage"), "0" * 64)


def read_ids() -> Any:
    return [text.tokens for text in read_texts([Path("ids.npy")], lambda: lambda piece: [], vocab=40)]


def read_form() -> Any:
    return PasskeyFormat.read(Path("passkey.json"))


def read_labels() -> Any:
    return LabelledForm.read(Path("passkey.json"))


def questions_of(name: str) -> Callable[[], Any]:
    line = BENCHMARKS[name].line
    assert line is not None

    def read() -> Any:
        return [question.model_dump() for question in read_lines(Path(f"{name}.jsonl"), line)[0]]

    read.__name__ = f"read_{name}"
    return read


RECIPE_CALLS: tuple[Call, ...] = (
    ("recipe", "check", "recipe/recipe.json"),
    ("recipe", "check", "recipe", "--model", "model"),
    ("recipe", "show", "recipe"),
    ("recipe", "show", "recipe", "--json"),
    ("recipe", "list", "."),
    ("hf", "model", "--recipe", "recipe", "-o", "new"),
    ("hf", "model", "--recipe", "recipe", "-o", "new", "--portable", "--allow-lossy"),
    ("gguf", "model", "--recipe", "recipe", "-o", "new.gguf", "--allow-lossy"),
    ("gguf", "model", "--recipe", "recipe", "-o", "new.gguf", "--static-long", "--allow-lossy"),
    ("onnx", "model", "--recipe", "recipe", "-o", "new"),
    ("verify", "a", "--files-only", "--recipe", "recipe"),
)
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
IMPORT = ("-o", "new", "--family", "llama")

READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader(
            "manifest",
            [
                Target(file, "json", (*artifact_calls(name), rebake))
                for file, name, rebake in (
                    ("a/lrconvert.json", "a", ("hf", "model", "--recipe", "recipe", "-o", "a", "--force")),
                    (
                        "m.lrconvert.json",
                        "m.gguf",
                        ("gguf", "model", "--recipe", "recipe", "-o", "m.gguf", "--force", "--allow-lossy"),
                    ),
                    ("o/lrconvert.json", "o", ("onnx", "model", "--recipe", "recipe", "-o", "o", "--force")),
                )
            ],
            ("a", "o"),
        ),
        Reader(
            "journal",
            [
                Target("journal.jsonl", "lines", (read_search_journal, go_on_with_journal)),
                Target("chained.jsonl", "lines", (chained_journal,)),
            ],
        ),
        Reader("results", [Target("earlier.json", "json", (read_results,))]),
        Reader("lock", [Target("verify.lock", "json", (read_lock,))]),
        Reader("recipe", [Target("recipe/recipe.json", "json", RECIPE_CALLS)], ("new",)),
        Reader(
            "table",
            [
                Target(
                    "4k_table.csv",
                    "table",
                    (
                        (
                            "recipe",
                            "import",
                            "4k_table.csv=4096",
                            *IMPORT,
                            "--theta",
                            "10000",
                            "--original-window",
                            "256",
                        ),
                        ("recipe", "import", "4k_table.csv", "--model", "model", "-o", "new"),
                    ),
                ),
                Target(
                    "factors.json",
                    "json",
                    (
                        ("recipe", "import", "factors.json", *IMPORT),
                        ("recipe", "import", "factors.json", "--model", "model", "-o", "new"),
                    ),
                ),
            ],
            ("new",),
        ),
        Reader(
            "config",
            [
                Target(
                    "model/config.json",
                    "json",
                    (*baking("model"), ("recipe", "derive", "model", "--method", "yarn", "--factor", "8", "-o", "new")),
                ),
                Target(
                    "a/config.json",
                    "json",
                    (*artifact_calls("a"), ("recipe", "import", "a", "-o", "new"), ("hf", "a", "-o", "new")),
                ),
            ],
            ("new",),
        ),
        Reader(
            "safetensors",
            [
                Target("model/model.safetensors", "safetensors", baking("model")),
                Target("a/model.safetensors", "safetensors", artifact_calls("a")),
            ],
            ("new",),
        ),
        Reader("index", [Target("sharded/model.safetensors.index.json", "json", baking("sharded"))], ("new",)),
        Reader(
            "quantised",
            [
                target
                for layout in LAYOUTS
                for target in (
                    Target(f"{layout}/config.json", "json", (("inspect", layout), ("hf", layout, "-o", "new"))),
                    Target(
                        f"{layout}/model.safetensors", "safetensors", (("inspect", layout), ("hf", layout, "-o", "new"))
                    ),
                )
            ],
            ("new",),
        ),
        Reader(
            "gguf",
            [
                Target(
                    "m.gguf",
                    "gguf",
                    (*artifact_calls("m.gguf"), *baking("m.gguf")[2:], ("recipe", "import", "m.gguf", "-o", "new")),
                ),
                Target("theirs.gguf", "gguf", baking("theirs.gguf")),
                Target(
                    "m.Modelfile",
                    "text",
                    (("verify", "m.gguf", "--files-only"), ("push", "m.gguf", "me/x", "--dry-run")),
                ),
            ],
            ("new",),
        ),
        Reader(
            "onnx",
            [
                Target("o/onnx/model.onnx", "onnx", (*artifact_calls("o"), ("hf", "o", "-o", "new"))),
                Target("o4/onnx/model.onnx", "onnx", artifact_calls("o4")),
                Target("o/genai_config.json", "json", artifact_calls("o")),
                Target("o/config.json", "json", artifact_calls("o")),
            ],
            ("new",),
        ),
        Reader(
            "adapter",
            [
                Target("adapter/adapter_config.json", "json", baking("model", "--adapter", "adapter")[2:]),
                Target("adapter/adapter_model.safetensors", "safetensors", baking("model", "--adapter", "adapter")[2:]),
            ],
            ("new",),
        ),
        Reader(
            "imatrix",
            [
                Target(
                    "matrix.gguf",
                    "gguf",
                    (
                        read_matrix,
                        (
                            "gguf",
                            "model",
                            "--recipe",
                            "recipe",
                            "-o",
                            "new.gguf",
                            "--type",
                            "q8_0",
                            "--imatrix",
                            "matrix.gguf",
                            "--allow-lossy",
                        ),
                    ),
                )
            ],
        ),
        Reader("plan", [Target("plan.toml", "toml", (read_plan,))]),
        Reader("stage", [Target("stage/result.json", "json", (read_stage,))]),
        Reader(
            "tokenizer",
            [
                Target("model/tokenizer.json", "json", (*baking("model")[2:6], ("verify", "a", "--files-only"))),
                Target("a/tokenizer.json", "json", artifact_calls("a")),
                Target("spm/tokenizer.json", "json", baking("spm")[3:5]),
                Target(
                    "pieces/tokenizer.model",
                    "protobuf",
                    (("gguf", "pieces", "--recipe", "recipe", "-o", "new.gguf", "--allow-lossy"),),
                ),
            ],
            ("new",),
        ),
        Reader(
            "settings",
            [
                target
                for file in SETTINGS
                for target in (
                    Target(f"model/{file}", "json", baking("model")[2:7]),
                    Target(f"a/{file}", "json", artifact_calls("a")),
                    *([Target(f"o/{file}", "json", artifact_calls("o"))] if file == "generation_config.json" else []),
                )
            ],
            ("new",),
        ),
        Reader(
            "card",
            [
                Target("a/README.md", "text", artifact_calls("a")),
                Target("model/LICENSE", "bytes", baking("model")[2:3]),
            ],
            ("new",),
        ),
        Reader(
            "texts",
            [
                Target("ids.npy", "npy", (read_ids,)),
                Target("passkey.json", "json", (read_form, read_labels)),
                *(Target(f"{name}.jsonl", "lines", (questions_of(name),)) for name in QUESTIONS),
            ],
        ),
    )
}
