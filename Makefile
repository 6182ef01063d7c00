# Everything runs in a virtual environment made here from pinned versions: a fresh machine needs Python >= 3.10 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test quality style clean

$(INSTALLED): pyproject.toml constraints/pinned.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints/pinned.txt torch
	$(BIN)/pip install --quiet --constraint constraints/pinned.txt --editable ".[dev]"
	# For the tests of timm models; see tests/conftest.py for why they are kept apart.
	$(BIN)/pip install --quiet --constraint constraints/pinned.txt --no-deps --upgrade --target $(VENV)/timm timm torchvision
	touch $@

demo: $(INSTALLED)  ## Fine-tune the shipped backbone on handwritten digits with S2A, LoRA, a linear probe and in full.
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

test: $(INSTALLED)  ## Run all tests, offline.
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests

quality: $(INSTALLED)  ## Check format and lint.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(INSTALLED)  ## Apply format and lint fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
