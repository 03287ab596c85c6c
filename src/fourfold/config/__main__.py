"""Print the reference page: `python -m fourfold.config > docs/configuration.md`."""

from __future__ import annotations

import sys

from fourfold.config.reference import reference_page

sys.stdout.write(reference_page())
