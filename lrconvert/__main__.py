# SPDX-License-Identifier: Apache-2.0
"""`python -m lrconvert`: what the installed command does."""

from lrconvert.cli import main

main()
