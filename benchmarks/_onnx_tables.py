# SPDX-License-Identifier: Apache-2.0
"""The page of `onnx_baseline.py`: its tables, and which of the limits the figures miss."""

from __future__ import annotations

import re
from typing import Any

from _common import median

RIGHT = 1e-6  # nats; the slightest mistake of a tool is a thousand times this
LONG_LIST = re.compile(r"\[[^\]]{80,}\]")  # factors in a refusal
COPY_ALLOWED, SPEEDUP_NEEDED, ANONYMOUS_ALLOWED_MB = 1.5, 2.0, 600


def is_right(values: dict[str, Any]) -> bool:
    return "kl_mean" in values and max(values["kl_mean"].values()) < RIGHT


def missed(results: dict[str, dict[str, dict[str, Any]]], cost: dict[str, Any], large: dict[str, Any]) -> list[str]:
    """The limits that these figures miss."""
    found = [f"{name}: not right" for name, by_tool in results.items() if not is_right(by_tool["lrconvert"])]
    if cost:
        if cost["ratio_to_copy"] > COPY_ALLOWED:
            found.append(f"{cost['ratio_to_copy']}x of a copy")
        if cost["times_faster"] and min(cost["times_faster"].values()) < SPEEDUP_NEEDED:
            found.append(f"{min(cost['times_faster'].values())}x faster than the fastest right baseline")
        if not cost["same_bytes_again"]:
            found.append("a second run gave other bytes")
    memories = [{**cost, **cost["tools"]["lrconvert"]}] if cost else []
    found += [
        f"{measured['anonymous_mb']} MB of anonymous memory"
        for measured in [*memories, *([large] if large else [])]
        if measured["anonymous_mb"] > max(ANONYMOUS_ALLOWED_MB, 2 * measured["largest_tensor_mb"])
    ]
    return found


def table(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    lines = [
        "| checkpoint | tool | KL below | at | one past | above | s | MB anonymous | MB of files | kB of graph |",
        "|" + " --- |" * 10,
    ]
    for name, by_tool in results.items():
        for tool, values in by_tool.items():
            cells = (
                [f"{kl:.1e}" for kl in values["kl_mean"].values()] if "kl_mean" in values else ["refuses", "", "", ""]
            )
            costs = [values["seconds"], values["anonymous_mb"], values.get("mb", ""), values.get("graph_kb", "")]
            lines.append("| " + " | ".join(map(str, [name, tool, *cells, *costs])) + " |")
    return lines


def refusals(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    return [
        f"- {name}, {tool}: {LONG_LIST.sub('[…]', values['refuses'])}"
        for name, by_tool in results.items()
        for tool, values in by_tool.items()
        if "refuses" in values
    ]


def cost_table(cost: dict[str, Any], large: dict[str, Any]) -> list[str]:
    lines = ["| what | s | times as long as ours | MB anonymous |", "| --- | --- | --- | --- |"]
    for name, values in cost["tools"].items():
        ratio = cost["times_faster"].get(name, "")
        lines.append(f"| {name} | {median(values['seconds'])} | {ratio} | {values['anonymous_mb']} |")
    lines.append(f"| copy with fsync | {median(cost['copy_seconds'])} | {round(1 / cost['ratio_to_copy'], 2)} | |")
    if large:
        lines.append(f"| lrconvert, 14 GB | {large['seconds']} | | {large['anonymous_mb']} |")
    return lines


ABOUT = """
`KL`: mean over the last 128 positions, in nats, of ONNX Runtime's answers (f32, CPU, an empty cache) against the
float64 reference. A checkpoint is named by its family, its original window and the attention factor that its config
states, if it does; otherwise LongRoPE's formula holds. Lengths: one below the original window, at it, one past it, and
1.5 times it. `MB anonymous`: peak memory without mapped files, of the process and its children. Exports are f32.
"""
