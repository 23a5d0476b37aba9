# SPDX-License-Identifier: Apache-2.0
"""Publishing on the Hugging Face Hub."""
