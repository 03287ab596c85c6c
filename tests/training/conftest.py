from __future__ import annotations

import sys
from pathlib import Path

# Lets the tests of this folder share `tiny` and run scripts beside them.
sys.path.insert(0, str(Path(__file__).parent))
