from __future__ import annotations

import sys
from pathlib import Path

# Lets tests share `pairwise`.
sys.path[:0] = [str(Path(__file__).parent)]
