# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run.py: every script's figures in one table, what is absent in a row that says so, the README's block."""

from __future__ import annotations

import ast
import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import run as benchmarks
from _common import Figure, facts, installed

SCRIPT = """
import sys
from _common import Figure, report, save
report(Figure("speed", 2.0, "s", "a copy", 1.0, limit=1.3), Figure("memory", 3.0, "s", memory_mb=40))
save("tried", {"arguments": sys.argv[1:]})
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A benchmark that takes no time, beside the modules that all of them import."""
    path = tmp_path / "tried.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(benchmarks.HERE)!r})\n{SCRIPT}")
    return path


def needing(found: str | None) -> benchmarks.Need:
    return benchmarks.Need("a peer", lambda: found)


def run_one(script: Path, tmp_path: Path, *, quick: bool = True, **more: object) -> benchmarks.Ran:
    benchmark = benchmarks.Benchmark("tried", 1, str(script), **more)  # type: ignore[arg-type]
    return benchmarks.ran(benchmark, tmp_path / "scratch", quick=quick)


def test_figures_of_a_script_are_rows_of_the_table(script: Path, tmp_path: Path) -> None:
    done = run_one(script, tmp_path)
    assert [figure.what for figure in done.figures] == ["speed", "memory"]
    assert done.note == ""
    lines = list(benchmarks.table([done]))
    assert lines[2] == "| tried | speed | 2 s | a copy | 1 s | 2x |  |  |"
    assert lines[3] == "| tried | memory | 3 s |  |  |  |  | 40 |"


def test_what_is_absent_is_a_row(script: Path, tmp_path: Path) -> None:
    done = run_one(script, tmp_path, needs=(needing(None),))
    assert (done.figures, done.note) == ([], "not run: needs a peer")
    assert list(benchmarks.table([done]))[2].startswith("| tried | not run: needs a peer |")
    assert len(run_one(script, tmp_path, needs=(needing("here"),)).figures) == 2


def test_what_the_disk_has_no_room_for_is_a_row_with_what_fits(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it begins; exit code 6 where nothing else was asked for."""
    monkeypatch.setattr(benchmarks, "free_disk", lambda place: 3_000_000_000)
    told = "not run: needs 40 GB in --scratch, where 3.0 GB are free"
    assert run_one(script, tmp_path, quick=False, disk=40.0).note == f"{told}; --quick needs 2 GB"
    assert run_one(script, tmp_path, quick=False, disk=40.0, quick_disk=4.0).note == told
    assert run_one(script, tmp_path, disk=40.0).note == ""  # a try has room
    monkeypatch.setattr(benchmarks, "BENCHMARKS", (benchmarks.Benchmark("tried", 1, str(script), disk=40.0),))
    assert benchmarks.main(["--only", "tried", "--scratch", str(tmp_path / "there")]) == 6
    assert told in capsys.readouterr().out
    assert benchmarks.main(["--list"]) == 0
    assert "[needs 40 GB in --scratch, where 3.0 GB are free; --quick needs 2 GB]" in capsys.readouterr().out


def test_a_script_runs_without_a_peer_that_it_can_do_without(script: Path, tmp_path: Path) -> None:
    done = run_one(script, tmp_path, wants={"--peer": needing(None)})
    assert (len(done.figures), done.note) == (2, "without a peer")
    given = benchmarks.Benchmark("tried", 1, "tried.py", ("SCRATCH",), wants={"--peer": needing("python3")})
    assert given.command(quick=False, scratch=tmp_path)[2:] == [str(tmp_path), "--peer", "python3"]


def test_a_try_and_a_run_without_a_peer_keep_no_results_of_the_script(script: Path, tmp_path: Path) -> None:
    kept = benchmarks.HERE / "results" / "tried.json"
    run_one(script, tmp_path)
    run_one(script, tmp_path, quick=False, wants={"--peer": needing(None)})
    assert not kept.exists()


def test_a_script_that_fails_says_its_last_words(script: Path, tmp_path: Path) -> None:
    script.write_text(script.read_text() + "\nraise SystemExit('the disk is full')\n")
    done = run_one(script, tmp_path)
    assert done.note == "failed: the disk is full"
    assert len(done.figures) == 2


def test_a_limit_is_of_the_ratio_where_there_is_a_peer() -> None:
    assert Figure("speed", 2.0, "s", "a copy", 1.0, limit=1.3).missed
    assert not Figure("speed", 1.2, "s", "a copy", 1.0, limit=1.3).missed
    assert Figure("files", 9, "of 10", limit=10, least=True).missed
    assert Figure("files", 9, "of 10", "peer", 10, limit=1, least=True).missed
    assert not Figure("files", 10, "of 10", "peer", 0, limit=1, least=True).missed  # no ratio, no judgement
    assert "≤ 1.3x, missed" in benchmarks.cells(Figure("speed", 2.0, "s", "a copy", 1.0, limit=1.3))


def test_every_script_hands_its_figures_over() -> None:
    """A benchmark of the table that forgets to would be a run without rows."""
    for benchmark in benchmarks.BENCHMARKS:
        tree = ast.parse((benchmarks.HERE / benchmark.script).read_text(encoding="utf-8"))
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert {"report", "Figure"} <= called, benchmark.script


def test_results_have_the_versions_of_what_is_installed() -> None:
    """Of torch and its like without their import; what is absent is left out."""
    versions = facts()["versions"]
    assert {name: versions[name] for name in ("numpy", "torch")} == {
        "numpy": version("numpy"),
        "torch": version("torch"),
    }
    assert {"python", "lrconvert", "transformers", "onnxruntime", "gguf"} <= versions.keys()
    assert "mobius-onnx" not in versions
    assert all(versions.values())


def test_a_row_has_the_versions_of_its_peers(script: Path, tmp_path: Path) -> None:
    """Those of the interpreters that it was given, and of no files; a script that fails has no rows to keep."""
    peer = benchmarks.Need("a peer", lambda: sys.executable, interpreter=True)
    absent = benchmarks.Need("another", lambda: None, interpreter=True)
    wants = {"--peer": peer, "--file": needing("here"), "--other": absent}
    done = run_one(script, tmp_path, wants=wants)
    assert done.peers == {"a peer": installed(sys.executable)}
    benchmarks.saved([done], tmp_path / "run.json")
    (row,) = json.loads((tmp_path / "run.json").read_text())
    assert row["peers"]["a peer"]["numpy"] == version("numpy")
    script.write_text("raise SystemExit('broken')")
    assert run_one(script, tmp_path, wants=wants).peers == {}


def test_a_run_replaces_what_it_measured_and_keeps_the_rest(tmp_path: Path) -> None:
    """What failed, or could not run, leaves the figures of the run before."""
    path = tmp_path / "run.json"
    first, second = benchmarks.BENCHMARKS[0].name, benchmarks.BENCHMARKS[1].name
    benchmarks.saved([benchmarks.Ran(second, [Figure("a", 1.0, "s")])], path)
    benchmarks.saved([benchmarks.Ran(first, [Figure("b", 2.0, "s")])], path)
    benchmarks.saved([benchmarks.Ran(second, [Figure("a", 3.0, "s")])], path)
    benchmarks.saved([benchmarks.Ran(second, [Figure("a", 9.0, "s")], note="failed: full")], path)
    benchmarks.saved([benchmarks.Ran(second, [], note="not run: needs a peer")], path)
    rows = json.loads(path.read_text())
    assert [(row["name"], row["figures"][0]["ours"]) for row in rows] == [(first, 2.0), (second, 3.0)]
    assert all(row["date"] and row["versions"] for row in rows)


def test_the_readme_has_the_headlines_of_what_was_kept(tmp_path: Path) -> None:
    what, peer = benchmarks.HEADLINES[0]
    figures = [Figure(what, 0.25, "s", peer, 5.0, limit=0.05, memory_mb=50), Figure("else", 1.0, "s")]
    path = tmp_path / "run.json"
    benchmarks.saved([benchmarks.Ran("one", figures)], path)
    made = benchmarks.block(json.loads(path.read_text()))
    assert f"| {what} | 0.25 s | {peer} | 5 s | 0.05x | ≤ 0.05x | 50 |" in made
    assert "| else |" not in made
    assert len([line for line in made.splitlines() if line.startswith("|")]) == 3  # what wasn't measured has no row
    page = f"before\n{benchmarks.BEGIN}\nold\n{benchmarks.END}\nafter\n"
    assert benchmarks.with_block(page, made) == f"before\n{made}\nafter\n"
    with pytest.raises(ValueError, match="has no"):
        benchmarks.with_block("before", made)


def test_the_readmes_block_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["--readme", "--check"]) == 0
    assert capsys.readouterr().err == ""


def test_the_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [benchmark.name for benchmark in benchmarks.BENCHMARKS]
