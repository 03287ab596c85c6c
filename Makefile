# make quickstart    from nothing to a fine-tuned model: virtual environment, installs, model, run
# make test          the whole test suite, likewise from nothing
# make lint types    ruff's rules and format, the import contract; mypy
# make hooks         the same as a git hook before each commit
# make clean         removes the virtual environment and caches; what was trained stays in runs/
#
# PYTHON       the interpreter for the virtual environment (3.11 to 3.13); found by itself if not given
# TORCH_INDEX  an index to take torch from, such as PyTorch's own for CPU builds (see pytorch.org, "Get started")
# PYTEST_ARGS  more arguments for pytest
# WORKERS      tests at a time: one a processor, at most eight

BIN := .venv/bin
NUM_GPUS := $(shell sh scripts/count_gpus.sh)
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))

# The tests that this machine can run; pyproject.toml leaves those for GPUs out.
ifeq ($(NUM_GPUS),0)
MARKS :=
else ifeq ($(NUM_GPUS),1)
MARKS := -m "not multigpu and not whole_gpu"
else
MARKS := -m "not whole_gpu"
endif

.PHONY: quickstart test lint rules format imports types hooks venv clean

quickstart: .venv/installed
	$(BIN)/python examples/quickstart/quickstart.py

# One thread a process: the tests' tensors are small. tests/conftest.py says in which order.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(MARKS) $(PYTEST_ARGS)
ifneq ($(NUM_GPUS),0)
	$(BIN)/python -m pytest -m whole_gpu $(PYTEST_ARGS)
endif

# Each of its own, so that --keep-going shows what all of them say.
lint: rules format imports

rules: .venv/installed-dev
	$(BIN)/ruff check

format: .venv/installed-dev
	$(BIN)/ruff format --check

imports: .venv/installed-dev
	$(BIN)/lint-imports

types: .venv/installed-dev
	$(BIN)/mypy

hooks: .venv/installed-dev
	$(BIN)/pre-commit install

venv: .venv/installed-dev

.venv/installed: pyproject.toml scripts/install.sh
	sh scripts/install.sh .venv
	touch $@

.venv/installed-dev: .venv/installed
	sh scripts/install.sh .venv test check
	touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
