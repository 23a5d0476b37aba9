# SPDX-License-Identifier: Apache-2.0
"""The digests of our modeling code, as every family's artifacts carry it: `verify` runs no other code of a folder.

`python -m lrconvert.targets.hf.known_code` adds those of the file as it is now, `--check` only says whether all are
there. Digests are never taken away: artifacts of earlier versions carry earlier code.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256

from lrconvert.checkpoint.folder_code import KNOWN
from lrconvert.families import family_names, get_family
from lrconvert.targets.hf.plan import modeling_code


def missing(known: list[dict[str, str]]) -> list[dict[str, str]]:
    """A row for each native class whose code of today is not among `known`."""
    digests = {row["sha256"] for row in known}
    classes = sorted({get_family(name).hf_class for name in family_names()})
    rows = [{"class": name, "sha256": sha256(modeling_code(name)).hexdigest()} for name in classes]
    return [row for row in rows if row["sha256"] not in digests]


def main(arguments: list[str]) -> int:
    known = json.loads(KNOWN.read_text(encoding="utf-8"))
    added = missing(known)
    if arguments == ["--check"]:
        return 1 if added else 0
    if added:
        KNOWN.write_text(json.dumps(known + added, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
