# SPDX-License-Identifier: Apache-2.0
"""Faults of a Hub, met by the unmodified client: nothing half published, an exit code that says whose fault it is.
Where a request is tried again and again, the client doesn't wait in between.

Not tried, since the server here has none of it: a Xet storage that takes files, quotas as the real Hub words them.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from conftest import recipe_for
from support.hub_server import GITATTRIBUTES, Fault, Hub
from support.hub_user import ID, MAIN_HURRIED, User, ok, published
from support.pico import write_pico

from lrconvert.artifact.bake import bake
from lrconvert.checkpoint import open_model
from lrconvert.targets import hf

REPO = r"/api/models/me/artifact"
FAULTS = {
    "no answer to who asks": Fault("GET /api/whoami", 500),
    "a repository that can't be made": Fault("POST /api/repos/create", 500),
    "a quota": Fault("POST /api/repos/create", 402),
    "a broken preupload": Fault(f"POST {REPO}/preupload", 0),
    "no place for weights": Fault("POST .*/info/lfs/objects/batch", 403),
    "a commit that fails": Fault(f"POST {REPO}/commit", 500),
    "a commit meanwhile": Fault(f"POST {REPO}/commit", 412),
    "a connection that breaks off in the commit": Fault(f"POST {REPO}/commit", 0),
    "a token without rights": Fault(f"POST {REPO}/commit", 403),
}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    model = open_model(write_pico(tmp_path / "pico"))
    bake(hf.plan(model, recipe_for(model), tmp_path / "artifact"))
    return tmp_path / "artifact"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_publishes_nothing_and_the_next_push_does(hub: Hub, user: User, artifact: Path, name: str) -> None:
    """The branch stays as it was, no bug of ours is reported, and the same command works afterwards."""
    hub.faults = [FAULTS[name]] * 8  # the client tries some requests again
    failed = user.python(MAIN_HURRIED, "push", artifact, ID)
    assert failed.code in (2, 6), (failed.code, failed.err)
    assert failed.err.splitlines()[-1].startswith("lrconvert: ") and "a bug in" not in failed.err
    assert ID not in hub.repos or published(hub) == {}
    hub.faults = []
    ok(user("push", artifact, ID))
    assert "lrconvert.json" in published(hub)


def test_a_hub_that_is_busy_is_waited_for(hub: Hub, user: User, artifact: Path) -> None:
    """429 with Retry-After on a request that the client repeats: the push goes through."""
    hub.faults = [Fault("POST .*/info/lfs/objects/batch", 429, {"Retry-After": "0"})]
    ok(user("push", artifact, ID))
    assert hub.faults == [] and "lrconvert.json" in published(hub)


def test_large_files_go_in_parts(hub: Hub, user: User, artifact: Path) -> None:
    """As the Hub takes files of gigabytes: the parts make the file, each once."""
    weights = (artifact / "model.safetensors").read_bytes()
    hub.part = 100_000
    ok(user("push", artifact, ID))
    assert published(hub)["model.safetensors"] == weights and hub.puts == -(-len(weights) // hub.part) > 3


def test_a_part_that_fails_publishes_nothing_and_the_next_push_does(hub: Hub, user: User, artifact: Path) -> None:
    hub.part, hub.fail_put = 100_000, 3
    failed = user("push", artifact, ID)
    assert failed.code == 6 and "a bug in" not in failed.err, failed.err
    assert published(hub) == {} and hub.objects.keys() <= {sha256(GITATTRIBUTES).hexdigest()}
    ok(user("push", artifact, ID))
    assert "model.safetensors" in published(hub)


def test_a_xet_storage_that_refuses_publishes_nothing_and_the_next_push_does(
    hub: Hub, user: User, artifact: Path
) -> None:
    """The client takes Xet where its library is installed, and gets an address from the Hub."""
    pytest.importorskip("hf_xet")
    failed = user("push", artifact, ID, HF_HUB_DISABLE_XET="0")
    assert failed.code == 6 and "a bug in" not in failed.err, failed.err
    assert any("/xet/" in request for request in hub.requests) and published(hub) == {}
    ok(user("push", artifact, ID))
    assert "model.safetensors" in published(hub)
