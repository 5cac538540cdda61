# make demo: the main job on structures that ship with pymatgen.   make test: the whole suite.
# Each makes its own virtual environment in .venv and installs into it; nothing is needed beforehand but Python 3.11
# and a C++17 compiler. TORCH_INDEX: the package index with PyTorch's CPU builds, looked at where no GPU is found; there
# 2.13.0+cpu ranks above the 2.13.0 of the usual index, which brings gigabytes of CUDA packages on Linux.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH_FROM := $(if $(HAS_GPU),,$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)))

# Threads that spin while they wait slow each other down many times over where other programs use the cores too.
test test-all: export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-all lint bench gpu-check cuda-compile clean

demo: $(VENV)/installed
	$(BIN)/xrdfast demo --output demo-run

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not long"

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

bench: $(VENV)/installed-test
	$(BIN)/python -m benchmarks.run

# With the Python at hand, whose torch knows the device; OUT: folder of the result.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(if $(OUT),--out $(OUT))

cuda-compile:
	benchmarks/check_cuda.sh csrc

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_FROM) --constraint constraints.txt torch
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo-run build dist *.egg-info
