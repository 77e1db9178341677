"""`python -m tiny train | export | evaluate`: make ernie-image-tiny, write it as single files, measure it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
standalone = importlib.import_module("standalone")
standalone.load_pack()
sys.exit(importlib.import_module(f"{standalone.PACK_NAME}.tiny.cli").main())
