# SPDX-License-Identifier: Apache-2.0
"""A Hub, and somebody who publishes there."""

from support.hub_user import hub, user

__all__ = ["hub", "user"]
