"""``python -m frog_triton``."""

import sys

from .cli import main

sys.exit(main())
