# Everything runs in a virtual environment made here from pinned versions: a fresh machine needs Python >= 3.10 and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Of the benchmarks' backbone, fetched on first use.
WEIGHTS = outputs/dinov2
INSTALLED = $(VENV)/.installed

.PHONY: coverage demo docs sanitize test test-slow benchmark benchmark-gpu quality style clean

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

docs: $(INSTALLED)  ## Build the documentation into site/; broken links are errors.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# One thread in each process: two would wait for one another's, which takes twice as long.
test: $(INSTALLED)  ## Run all tests, offline, in two processes; show the slowest, and how much of the package they cover.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15 --cov --cov-report=

coverage: $(INSTALLED)  ## What the last `make test` left uncovered, by file.
	$(BIN)/coverage report --show-missing

# Of the libraries that the slow tests train with: DeepSpeed's setup looks at the installed torch.
$(VENV)/.engines: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints/pinned.txt bitsandbytes torchao
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints/pinned.txt --no-build-isolation deepspeed
	touch $@

test-slow: $(VENV)/.engines  ## The long sweeps and soaks that `make test` leaves out, offline.
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -m slow

sanitize: $(INSTALLED)  ## The kernels' checks under address and undefined-behaviour sanitizers, for every instruction set here.
	tests/activations/sanitize.sh $(BIN)/python -q

benchmark: $(INSTALLED)  ## All benchmarks at a reduced setting, on the CPU: less than half an hour on two cores.
	$(BIN)/python benchmarks/memory_and_speed.py --preset reduced --device cpu
	$(BIN)/python benchmarks/accuracy.py $(WEIGHTS) --setting reduced --device cpu
	$(BIN)/python benchmarks/fidelity.py $(WEIGHTS) --setting reduced --device cpu
	$(BIN)/python benchmarks/kernel_speed.py --setting reduced --device cpu

benchmark-gpu: $(INSTALLED)  ## All benchmarks in full, on a CUDA device.
	@$(BIN)/python -c "import torch; torch.cuda.is_available() or exit('make benchmark-gpu: PyTorch sees no CUDA device; make benchmark runs on the CPU')"
	$(BIN)/python benchmarks/memory_and_speed.py --preset full --device cuda
	$(BIN)/python benchmarks/accuracy.py $(WEIGHTS) --setting full --device cuda
	$(BIN)/python benchmarks/fidelity.py $(WEIGHTS) --setting full --device cuda
	$(BIN)/python benchmarks/kernel_speed.py --setting full --device cuda

quality: $(INSTALLED)  ## Check format, lint and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED)  ## Apply format and lint fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
