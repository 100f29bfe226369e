# Everything that is done with this repository, each its own target. Needs Python >= 3.11 with pip, and make.
# Where packages come from is pip's own configuration.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# Of tests that run side by side: one more than cores.
PROCESSES = $(shell $(PYTHON) -c 'import os; print(1 + min(os.cpu_count() or 1, 4))')

# Stamps: an environment is made once, and again when what it is made from changes.
RUNTIME := $(VENV)/.runtime-installed
DEV     := $(VENV)/.dev-installed
LIBRARIES := build/libraries/.installed
RAY     := build/ray/.installed

.PHONY: help demo bench architectures test test-families test-gpu test-libraries test-network test-ray test-invariance interrupts soak-hooks proof check lint types layers docs notebooks coverage format env clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(RUNTIME)  ## Run the bundled model on three worker processes
	$(BIN)/lingualinked demo

bench: $(RUNTIME)  ## Run one benchmark: make bench NAME="hops --repeats 9"; without NAME, list them
	$(BIN)/python -m benchmarks $(or $(NAME),--help)

# What draws architectures: any text; empty for all of them.
FAMILIES ?= $(shell git rev-parse HEAD 2>/dev/null || echo none)

# Files are what is shared out: their tests share models and clusters. They wait for workers much of the time.
test: $(DEV)  ## Run the tests, on up to four cores; of 32 architectures the 8 usual ones and 6 that the commit draws, and a fifth of all model types
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(if $(FAMILIES),--families $(FAMILIES)) $(OPTIONS)

test-families: FAMILIES =
test-families: test  ## Run the tests, all architectures included

# It writes docs/compatibility.md and the list of types that need no trial.
architectures: $(DEV)  ## Try every decoder-only model type of the installed transformers; write the table of the docs
	$(BIN)/python tests/every_architecture.py

# First what only a GPU has, and the stages in this process; the rest file by file.
test-gpu: $(DEV)  ## Run the tests that compare bits on a CUDA GPU; they are skipped where there is none
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --accelerator cuda tests/process/gpu tests/model tests/process

# They are not in the environment of the other targets: what they need is three times as much as what the project needs.
test-libraries: $(LIBRARIES)  ## Run the tests of nnsight, TransformerLens, pyvene and captum on a sharded model
	PYTHONPATH=$(dir $(LIBRARIES)) $(BIN)/python -m pytest tests/process/libraries

# As for test-libraries: Ray is large, and nothing else here needs it.
test-ray: $(RAY)  ## Run the tests on a Ray cluster of two nodes, which they start on this machine
	PYTHONPATH=$(CURDIR)/$(dir $(RAY)) $(BIN)/python -m pytest tests/process/ray

# Of hosts in network namespaces, so as root. CI draws one of the lengthy ones in `make proof SAMPLE=`.
test-network: $(DEV)  ## Run callers and daemons on hosts of their own, joined by limited, cut and overheard networks
	LINGUALINKED_NETWORK=all $(BIN)/python -m pytest -o timeout=600 -o faulthandler_timeout=500 -o log_cli=true -o log_cli_level=INFO tests/network

interrupts: $(DEV)  ## Send 300 interrupts at random moments beside other work: none may be lost
	LINGUALINKED_NUM_INTERRUPTS=300 $(BIN)/python -m pytest -s -o timeout=0 -o faulthandler_timeout=0 tests/process/test_interrupts.py

test-invariance: $(DEV)  ## Compare the logits of 1,000 prompts in batches of 1, 7 and 64, in 1 to 8 stages, with 1 and 2 threads, while layers move
	LINGUALINKED_NUM_PROMPTS=1000 $(BIN)/python -m pytest -s -o timeout=0 -o faulthandler_timeout=0 tests/process/test_batch_invariance.py -k one_digest

soak-hooks: $(DEV)  ## Run eight threads with hooks on sessions of their own 300 times while layers move: no row may be wrong
	LINGUALINKED_NUM_HOOK_ROUNDS=300 $(BIN)/python -m pytest -s -o timeout=0 -o faulthandler_timeout=0 tests/process/test_hooks_under_fire.py -k eight_threads

# SAMPLE is a text, such as a commit: it draws a few cases that take seconds. Without it, all take about an hour.
proof: $(DEV)  ## Compare millions of products with torch's, refuse wrong orders, force instruction sets; SAMPLE= for a few, and a test of the network
	$(BIN)/python -m benchmarks products $(if $(SAMPLE),--sample $(SAMPLE))
	$(if $(SAMPLE),LINGUALINKED_NETWORK=$(SAMPLE) $(BIN)/python -m pytest -q -o timeout=300 -o faulthandler_timeout=250 -m lengthy tests/network)
	$(if $(SAMPLE),,LINGUALINKED_PROOF=all $(BIN)/python -m pytest -q -o timeout=0 -o faulthandler_timeout=0 tests/unit/model/exact/test_probe.py tests/unit/model/exact/test_float_probe.py tests/unit/model/exact/test_attention_orders.py tests/model/test_instruction_sets.py)

check: lint types layers test docs notebooks  ## Everything that has to hold before a commit

lint: $(DEV)  ## Style, docstrings and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)  ## Static types
	$(BIN)/mypy

layers: $(DEV)  ## Who may import whom
	$(BIN)/lint-imports --no-logo --no-cache  # cached imports go stale when a module is added

docs: $(DEV)  ## Build the documentation; a warning is an error
	$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs build/docs

notebooks: $(DEV)  ## Execute the notebooks
	$(BIN)/python -m pytest -n $(PROCESSES) --nbmake --nbmake-timeout=300 -o timeout=600 -W default notebooks

coverage: $(DEV)  ## Run the tests and report branch coverage, worker processes included
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

format: $(DEV)  ## Write the code the way `lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(DEV)  ## Make the environment with the development tools

clean:  ## Remove what was built; the environment stays
	rm -rf build dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis docs/notebooks

# torch comes first and in the pinned version, before anything else can ask for another build of it. The project itself
# is installed editable: with the src layout nothing imports it by accident from the working folder, and what a
# wheel would add to that (are all data files in it?) is checked by tests/unit/test_package.py.
$(RUNTIME): pyproject.toml constraints.txt hatch_build.py $(wildcard src/lingualinked/kernels/*.[ch])
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python " + sys.version.split()[0] + " is too old: set PYTHON to 3.11 or newer")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): once, about two minutes"
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

# The project is installed already, and is not built again for what it needs besides.
$(DEV): $(RUNTIME)
	$(PIP) install --quiet -c constraints.txt "lingualinked[dev]"
	@touch $@

# Beside the environment, so that nothing in it changes; --no-deps, since the list is complete.
$(LIBRARIES): $(DEV) tests/process/libraries/requirements.txt
	rm -rf $(dir $@)
	$(PIP) install --quiet --no-deps --target $(dir $@) -r tests/process/libraries/requirements.txt
	@touch $@

$(RAY): $(DEV) tests/process/ray/requirements.txt
	rm -rf $(dir $@)
	$(PIP) install --quiet --no-deps --target $(dir $@) -r tests/process/ray/requirements.txt
	@touch $@
