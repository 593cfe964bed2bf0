"""Does the composition beat its parts? The code is in ``bench/composition/``.

python bench/composition.py [--json FILE] [--base-url URL]
"""

from __future__ import annotations

import sys
from pathlib import Path

# As a script, this file's folder comes first on the path, and there ``composition`` is itself.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.composition.run import main

if __name__ == "__main__":
    sys.exit(main())
