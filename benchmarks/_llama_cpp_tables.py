# SPDX-License-Identifier: Apache-2.0
"""The page of `llama_cpp_runs.py`, written from the results of all models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

JUDGED = 512  # tokens of a text whose perplexity is measured
WINDOW, WINDOW_JUDGED = 1024, 256  # tokens of a short prompt, and of those that count
READ, DROPPED, MORE = 1024, 256, 64  # of a context shift


def markdown(results: Sequence[dict[str, Any]]) -> str:
    lines = ["GGUF files with a uniform YaRN recipe of 8x, in llama.cpp on a CPU, cache in f16.", ""]
    for found in results:
        versions = ", ".join(f"{name} {what}" for name, what in (found["versions"] | found["libraries"]).items())
        lines += [
            f"## {found['model']}: window {found['original_window']:,} → {found['window']:,}, attention factor "
            f"{found['attention_factor']:.4g}",
            "",
            f"{found['date']}, `{found['command']}`; {versions}. Text: {found['text_file']}.",
            f"Tensors: {'; '.join(f'{kind}: {types}' for kind, types in found['tensors'].items())}.",
            "",
        ]
        for section, written in SECTIONS.items():
            if section in found:
                lines += written(found)
    return "\n".join(lines)


def _text_section(found: dict[str, Any]) -> Iterator[str]:
    yield f"Perplexity of the same last {JUDGED} tokens. The set `none`: the same weights without factors, which is"
    yield "what llama.cpp's own converter writes."
    yield ""
    rows = [row for row in found["text"] if "set" in row]
    yield from _table(
        ("type", "tokens", "set", "perplexity"),
        [[row["type"], f"{row['tokens']:,}", row["set"], row["perplexity"]] for row in rows],
    )
    for row in found["text"]:
        if "completion" in row:
            text = " ".join(row["completion"].split())
            yield f"- {row['type']}, after {row['prompt_tokens']:,} tokens: … {row['prompt_ends']} **{text}**"
    yield ""


def _passkey_section(found: dict[str, Any]) -> Iterator[str]:
    yield "Passkeys: the same documents in both runtimes."
    yield ""
    heads = ("tokens", "runtime", "right", "of", "trials that differ from transformers")
    yield from _table(heads, list(_passkeys(found["passkey"])))


def _price_section(found: dict[str, Any]) -> Iterator[str]:
    yield f"Short prompts: the last {WINDOW_JUDGED} tokens of {found['windows']} windows of {WINDOW:,}; mean ± standard"
    yield "error, differences window by window. The set `none` is the file without factors."
    yield ""
    heads = ("type", "set", "context", "perplexity", "nats", "more than none", "more than short", "passkeys of 2,048")
    rows = []
    for row in found["price"]:
        passkeys = row.get("passkey_2048", [])
        rows.append(
            [
                row["type"],
                row["set"],
                f"{row['context']:,}",
                row["perplexity"],
                *(_plus_minus(row.get(key)) for key in ("nats", "more_nats_than_none", "more_nats_than_short")),
                f"{sum(passkeys)} of {len(passkeys)}" if passkeys else "",
            ]
        )
    yield from _table(heads, rows)


def _shift_section(found: dict[str, Any]) -> Iterator[str]:
    yield f"A context shift: {READ:,} tokens read, {DROPPED} forgotten, the rest moved to the start; the next {MORE}"
    yield "tokens against the same without moving."
    yield ""
    rows = [
        [row["type"], row["attention_factor"], f"{row['kl_mean']:.1e}", f"{row['kl_max']:.1e}", row["more_nats"]]
        for row in found["shift"]
    ]
    yield from _table(("type", "attention factor", "KL mean", "KL max", "more nats"), rows)


SECTIONS = {"text": _text_section, "passkey": _passkey_section, "price": _price_section, "shift": _shift_section}


def _passkeys(rows: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    exact = {row["tokens"]: row["right"] for row in rows if row["runtime"].startswith("transformers")}
    for row in rows:
        differ = sum(ours != theirs for ours, theirs in zip(row["right"], exact[row["tokens"]], strict=True))
        yield [f"{row['tokens']:,}", row["runtime"], sum(row["right"]), len(row["right"]), differ]


def _plus_minus(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.4f} ± {value[1]:.4f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [heads, ["---"] * len(heads), *rows]
    return [*(f"| {' | '.join(map(str, row))} |" for row in cells), ""]
