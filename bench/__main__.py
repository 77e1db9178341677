"""`python -m bench`: load the pack, then hand over to its command line."""

from __future__ import annotations

import importlib
import sys

from standalone import PACK_NAME, load_pack

load_pack()
sys.exit(importlib.import_module(f"{PACK_NAME}.bench.cli").main())
