# SPDX-License-Identifier: Apache-2.0
"""Publishing on the Hugging Face Hub: what would change there, and one commit that changes it."""

from lrconvert.hub.publish import Plan, Pushed, plan, push, upload

__all__ = ["Plan", "Pushed", "plan", "push", "upload"]
