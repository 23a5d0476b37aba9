# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face config has to hold to be read the same by every supported version and engine.

The logits of one version can't show what another would make of the config: `save_pretrained` of transformers 5
writes a config that 4.57 silently reads as plain RoPE. So these are read off the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrconvert.artifact.checks import Row, rows_of
from lrconvert.artifact.record import BakeRecord
from lrconvert.artifact.statements import Difference, Facts, rows_from
from lrconvert.checkpoint import Checkpoint, Model, read_json
from lrconvert.checkpoint.adapter import LM_HEAD
from lrconvert.checkpoint.links import own_file
from lrconvert.checkpoint.tensor_file import SUFFIX, TensorFile
from lrconvert.errors import InputError
from lrconvert.families import Family
from lrconvert.rope import RopeSpec
from lrconvert.targets.hf.read import open_artifact
from lrconvert.targets.hf.statements import dtype_of, folder_rows

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ConfigCheck:
    """`broken` says whether the config, in its folder, breaks what `reason` says."""

    case: str
    broken: Callable[[Config, Path, Family], bool]
    reason: str


def _auto_map_file_is_missing(config: Config, folder: Path, family: Family) -> bool:
    named = config.get("auto_map")
    modules = [str(value).partition(".")[0] for value in named.values()] if isinstance(named, Mapping) else []
    return any("--" not in module and own_file(folder, f"{module}.py") is None for module in modules)


CHECKS = (
    ConfigCheck(
        "rope_scaling",
        lambda config, folder, family: not config.get("rope_scaling") and bool(config.get("rope_parameters")),
        "rope_parameters without rope_scaling, as save_pretrained of transformers 5 writes it: transformers 4.57 "
        "computes plain RoPE from it",
    ),
    ConfigCheck(
        "rope_theta",
        lambda config, folder, family: config.get("rope_theta") is None,
        "no rope_theta at the top level: transformers 4.57 takes 10000 instead",
    ),
    ConfigCheck(
        "original window",
        lambda config, folder, family: config.get("original_max_position_embeddings") is None,
        "no original_max_position_embeddings at the top level: transformers 4.57 never uses the long set",
    ),
    ConfigCheck(
        "head_dim",
        lambda config, folder, family: family.hf_states_head_size and config.get("head_dim") is None,
        "no head_dim: transformers 4.57 fails on a Mistral with longrope",
    ),
    ConfigCheck(
        "architectures",
        lambda config, folder, family: config.get("architectures") != [family.hf_class],
        "architectures names another class than the native one: other engines don't know it",
    ),
    ConfigCheck(
        "auto_map",
        _auto_map_file_is_missing,
        "auto_map names a file that is not in the folder (save_pretrained of the native class leaves it behind): "
        "copy modeling_longrope.py from the artifact, or trust_remote_code fails",
    ),
)


def check_config(config: Config, folder: Path, family: Family) -> list[Row]:
    """A row for everything that some version or engine would read wrong; one `pass` when there is nothing."""
    broken = [(check.case, check.reason) for check in CHECKS if check.broken(config, folder, family)]
    return rows_of("config", "read alike by transformers 4.57 to 5.x", broken)


# What the header of a weight file says of who wrote it; transformers 4.57 reads others as TensorFlow's or not at all.
READ_AS_OURS = (None, "pt", "mlx")


def stored_problems(facts: Facts, opened: Checkpoint) -> list[Difference]:
    """What weight files say beside the weights, and tensors that are nobody's: some programs read both."""
    found = []
    for path in opened.weight_files():
        if path.suffix == SUFFIX and (said := TensorFile(path).metadata.get("format")) not in READ_AS_OURS:
            reason = f"{path.name}: its header says format {said!r:.40}, so transformers does not read it as PyTorch's"
            found.append(Difference(path.name, reason))
    known = {tensor.name for tensor in facts.model.roles.values()} | {LM_HEAD}
    if facts.compared:
        extra = sorted(opened.tensors.keys() - known - facts.model.checkpoint.tensors.keys())
        told = f"{', '.join(extra[:3])}{f' and {len(extra) - 3} more' if len(extra) > 3 else ''}"
        reason = f"{told}: in the weights, and neither the model's nor the source's"
        found += [Difference(extra[0], reason, known=not facts.ours)] if extra else []
    return found


def checks(artifact: Path, stored: Checkpoint | None, model: Model, spec: RopeSpec, record: BakeRecord) -> list[Row]:
    """What is read off the folder's files: what versions would read of config.json, and what all of them say."""
    opened = stored or open_artifact(artifact)
    try:
        dtype, weights = dtype_of(opened), opened.weight_files()
    except InputError as error:
        return [Row("weights", "weight files", "fail", reason=error.message)]
    config = check_config(read_json(artifact / "config.json"), artifact, model.family)
    facts = Facts(artifact, model, spec, record, dtype)
    beside = rows_from("weights", "nothing beside the weights", stored_problems(facts, opened))
    return [*config, *folder_rows(facts, weights), *(row for row in beside if row.verdict != "pass")]
