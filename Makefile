# What a newcomer needs: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3.11
VENV ?= .venv
# The exact build that the tests were run with. On its own and first, so that nothing else chooses a torch.
TORCH ?= torch==2.13.0
PIP_FLAGS ?= --quiet --disable-pip-version-check

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo docs test test-real lint types contracts unit format clean clean-all

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## Create .venv and fill it; nothing to do when pyproject.toml has not changed

# Touched only when every step worked: an install that failed half-way is done again.
$(INSTALLED): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one with make PYTHON=..."; exit 1; }
	@echo "Filling $(VENV) (once; some minutes)"
	"$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install $(PIP_FLAGS) "$(TORCH)"
	"$(BIN)/python" -m pip install $(PIP_FLAGS) --editable ".[all,dev]"
	@touch "$@"

demo: $(INSTALLED)  ## Export the default model and ask it about a picture
	"$(BIN)/triptych" demo

test: lint types contracts unit  ## Lint, types, import contracts, tests (not those that need whole real checkpoints)

lint: $(INSTALLED)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

types: $(INSTALLED)
	"$(BIN)/mypy"

contracts: $(INSTALLED)
	"$(BIN)/lint-imports" --no-logo

unit: $(INSTALLED)
	"$(BIN)/python" -m pytest -m "not real" --numprocesses 2 --durations=10

test-real: $(INSTALLED)  ## Tests on whole real checkpoints, fetched by exact version and sha256
	"$(BIN)/python" -m pytest -m real --numprocesses 2 --dist loadfile --durations=10

docs: $(INSTALLED)  ## Write a page for every registered pass into docs/passes
	"$(BIN)/triptych" passes show --out docs/passes

format: $(INSTALLED)  ## Rewrite the sources in the project's format
	"$(BIN)/ruff" check --fix-only .
	"$(BIN)/ruff" format .

clean:  ## Remove what was built and cached; .venv and fetched checkpoints stay
	rm -rf build dist demo-output docs/passes src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find benchmarks compiler modules passes runtime src tests -type d -name __pycache__ -prune -exec rm -rf {} +

clean-all: clean  ## Also remove .venv and the fetched checkpoints
	rm -rf "$(VENV)" .cache
