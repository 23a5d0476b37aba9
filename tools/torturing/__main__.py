# SPDX-License-Identifier: Apache-2.0
"""`tools/torture`: see CONTRIBUTING.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.forks import FOLDER, ForkedCommands, ForkedSessions, wait_for_servers

from torturing.scenarios import SCENARIOS
from torturing.trials import Found, full_disks, kills, races, trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/torture", description="Exit code 1: something was lost or mixed.")
    parser.add_argument("--kills", type=int, default=0, help="of each command")
    parser.add_argument("--disks", type=int, default=0, help="full disks for each command; needs the right to mount")
    parser.add_argument("--races", type=int, default=0, help="of each command with another")
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="also write what was found there")
    options = parser.parse_args()
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as root:
        os.environ.setdefault(FOLDER, root)
        plain, training, sessions = ForkedCommands(), ForkedCommands(training=True), ForkedSessions()
        sessions.prepare()
        for name in options.scenario or SCENARIOS:
            scenario = SCENARIOS[name]
            with trial(scenario, Path(root), training if scenario.trains else plain) as tried:
                for misfortune, count in ((kills, options.kills), (full_disks, options.disks), (races, options.races)):
                    if count and not (misfortune is full_disks and scenario.hub):
                        found.append(_said(misfortune(tried, count)))
        plain.close()
        training.close()
        sessions.close()
        wait_for_servers()
    if options.json is not None:
        options.json.write_text(json.dumps(_record(found), indent=1) + "\n")
    return 1 if any(each.findings for each in found) else 0


def _said(found: Found) -> Found:
    outcomes = ", ".join(f"{what}: {count}" for what, count in sorted(found.outcomes.items()))
    print(f"{found.scenario:<8} {found.misfortune:<10} {found.seconds:5.0f} s  {outcomes}", flush=True)
    for finding in found.findings[:5]:
        print(f"    {finding}", flush=True)
    return found


def _record(found: list[Found]) -> dict[str, object]:
    names = ("numpy", "torch", "transformers", "huggingface_hub", "gguf", "onnx")
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["tools/torture", *sys.argv[1:]]),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "trials": [{**vars(each), "seconds": round(each.seconds)} for each in found],
    }


if __name__ == "__main__":
    sys.exit(main())
