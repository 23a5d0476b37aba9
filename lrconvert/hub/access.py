# SPDX-License-Identifier: Apache-2.0
"""Access to the Hugging Face Hub: who is signed in, may they write, and what its refusals mean."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrconvert import __version__
from lrconvert.errors import EnvironmentFailure, InputError, LrconvertError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access"


@dataclass(frozen=True)
class Account:
    """Whose token it is and what it is called; never the token itself."""

    user: str
    token_name: str

    def __str__(self) -> str:
        return f"token {self.token_name!r} of {self.user}"


def client() -> HfApi:
    """The client, for the Hub that the environment names, with the token that is stored there."""
    from huggingface_hub import HfApi

    return HfApi(library_name="lrconvert", library_version=__version__)


def sign_in(name: str) -> tuple[HfApi, Account, str]:
    """The client, who is signed in, and the full Hub id of `name`, before anything costs time.

    Raises `UsageError` for a name that the Hub doesn't allow, `EnvironmentFailure` without a token that writes.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(
            f"{name!r} is not a valid Hub name ({str(error).partition(chr(10))[0].rstrip('.')})",
            remedy="Give OWNER/NAME, of letters, digits, '-', '_' and '.'",
        ) from error
    if get_token() is None:
        raise EnvironmentFailure("publishing on the Hub needs a token, and there is none", remedy=LOG_IN)
    api = client()
    with hub_errors("signing in", "the token"):
        found = api.whoami()
    token = found.get("auth", {}).get("accessToken", {})
    account = Account(str(found.get("name")), str(token.get("displayName", "without a name")))
    if not _writes(token):
        raise EnvironmentFailure(f"{account} can't write: its role is {token.get('role')!r}", remedy=LOG_IN)
    return api, account, name if "/" in name else f"{account.user}/{name}"


def _writes(token: dict[str, Any]) -> bool:
    """What the Hub says of a token. One with chosen permissions may still lack them here; then the Hub refuses."""
    if token.get("role") != "fineGrained":
        return token.get("role") != "read"
    scopes = token.get("fineGrained", {}).get("scoped", [])
    return any(permission.endswith("write") for scope in scopes for permission in scope.get("permissions", []))


@contextlib.contextmanager
def hub_errors(doing: str, who: object) -> Iterator[None]:
    """What the client raises, as errors of ours; exit code 6 where the Hub or the network is the reason."""
    from huggingface_hub.errors import HfHubHTTPError

    # The bases are those of its HTTP library, whichever that is; failed transfers come as RuntimeError.
    expected = (*HfHubHTTPError.__bases__, OSError, RuntimeError, ValueError)
    try:
        yield
    except LrconvertError:
        raise
    except HfHubHTTPError as error:
        raise _answered(doing, who, error) from error
    except Exception as error:
        if not isinstance(error, expected):
            raise
        if getattr(error, "response", None) is not None:  # older clients raise what the library has
            raise _answered(doing, who, error) from error
        reason = f" ({_line(error.__cause__)})" if error.__cause__ and isinstance(error, RuntimeError) else ""
        text = f"{doing}: {type(error).__name__}: {_line(error)}{reason}"
        if "metadata in README.md" in text:  # the Hub looked at the card before anything was sent
            raise InputError(text, remedy="Fix the metadata at the top of the artifact's README.md") from error
        raise EnvironmentFailure(text, remedy="Check the network and try again; finished uploads are kept") from error


def _line(error: object) -> str:
    """One line, without the signatures that addresses of a store carry."""
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", " ".join(str(error).split())).rstrip(".")


def _answered(doing: str, who: object, error: Any) -> EnvironmentFailure:
    """The Hub refused."""
    status = getattr(error.response, "status_code", None)
    reply = _line(getattr(error, "server_message", None) or str(error).partition("\n")[0])
    if status == 401:
        return EnvironmentFailure(f"{doing}: the Hub does not accept {who} (401: {reply})", remedy=LOG_IN)
    if status in (403, 404):
        return EnvironmentFailure(f"{doing}: {who} may not do that ({status}: {reply})", remedy=LOG_IN)
    if status in (409, 412):
        remedy = "Somebody else changed the repository; check it and try again"
        return EnvironmentFailure(f"{doing}: the Hub refused ({status}: {reply})", remedy=remedy)
    return EnvironmentFailure(f"{doing}: the Hub answered {status} ({reply})", remedy="Try again later")
