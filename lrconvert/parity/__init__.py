# SPDX-License-Identifier: Apache-2.0
"""Does an artifact compute what its recipe says? Cases, measures, tolerances, mutants, report."""

from lrconvert.artifact.checks import Row
from lrconvert.parity.options import Options
from lrconvert.parity.report import Report
from lrconvert.parity.verify import verify

__all__ = ["Options", "Report", "Row", "verify"]
