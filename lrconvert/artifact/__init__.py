# SPDX-License-Identifier: Apache-2.0
"""What every target shares: plan, staging, manifest, card, redaction."""
