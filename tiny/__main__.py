"""`python -m tiny train | export | evaluate`: make ernie-image-tiny, write it as single files, measure it."""

from __future__ import annotations

import importlib
import sys

from standalone import PACK_NAME, load_pack

load_pack()
sys.exit(importlib.import_module(f"{PACK_NAME}.tiny.cli").main())
