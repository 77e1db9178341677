# Everything a fresh machine needs is installed by the targets themselves, into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes, one thread each.
WORKERS ?= 2
# glibc hands large blocks back to the kernel after every tensor; keeping them makes torch on the CPU up to 3x faster.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 100000000000
export MALLOC_TOP_PAD_ ?= 100000000

PROMPT ?= a large red star in the center on a sky background

.PHONY: demo test test-host bench train-tiny clean

demo: $(VENV)/.demo
	$(BIN)/python -m standalone workflows/text_to_image.json --tiny --out out \
		--set prompt="$(PROMPT)" --set size=custom --set width=128 --set height=128

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -m "not host and not gpu" -n $(WORKERS) --dist loadfile

# A real ComfyUI: make test-host COMFYUI_DIR=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python
# (the python that ComfyUI runs with; ours is used where none is named). Pages are opened in the chromium on PATH.
test-host: $(VENV)/.host
	$(BIN)/python -m pytest -q -rs -m host tests/host

bench: $(VENV)/.test
	$(BIN)/python -m bench all

train-tiny: $(VENV)/.demo
	$(BIN)/python -m tiny train

clean:
	rm -rf $(VENV) out

# torch is pinned so that a machine without a GPU is not sent gigabytes of CUDA by a newer release's defaults.
$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install -q ".[dev,parity]"
	touch $@

$(VENV)/.host: $(VENV)/.test
	$(BIN)/python -m pip install -q ".[host]"
	touch $@
