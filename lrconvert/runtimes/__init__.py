# SPDX-License-Identifier: Apache-2.0
"""One file a runtime: loads an artifact in a process of its own, as a user would, and answers logits."""
