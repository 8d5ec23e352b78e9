# Both commands set up one .venv by themselves; a second call starts at once.
# pip's own environment variables (PIP_INDEX_URL, PIP_PROXY, ...) are honoured.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test slow check site bench dist docs clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.demo ## train on handwritten digits under watch; an alarm goes off
	$(BIN)/python examples/digits.py

test: $(VENV)/.dev ## run the tests
	GRADWATCH_STRICT=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

slow: $(VENV)/.dev ## run the long checks that make test leaves out
	GRADWATCH_STRICT=1 $(BIN)/python -m pytest -m slow

check: $(VENV)/.dev site ## lint, types, the docs' links and examples, and their site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/check.py
	$(BIN)/python docs/gallery.py
	$(BIN)/python docs/tasks.py
	@command -v chromium >/dev/null || echo "note: the tests of reports in a browser are \
	skipped; they need Chromium (apt-get install chromium) and '$(BIN)/pip install playwright'"

site: $(VENV)/.dev ## build the site of the docs in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(VENV)/.dev ## measure what a watch costs
	$(BIN)/python -m benchmarks.overhead

dist: $(VENV)/.dev ## build the wheel and try it in a fresh environment
	$(PIP) build
	$(BIN)/python docs/installed.py --keep build/dist

docs: $(VENV)/.dev ## write the pages that come from the catalogues
	$(BIN)/python docs/generate.py

clean: ## remove the environment
	rm -rf $(VENV) build

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.demo
