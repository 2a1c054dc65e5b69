# make demo   the whole road on the CPU: environment, then SFT, DPO and scores of a tiny Hymba
# make test   the tests
# make bench-quick   the benchmarks' ratios at small sizes, against a slow regression
# make docs   the documents as a site, in build/site/index.html
# make lint   style, types, import layers
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
BFCL := $(abspath $(VENV))/bfcl-eval
BFCL_PYTHON ?= $(BIN)/python
RECIPE ?= recipes/tiny/arithmetic.yaml
WORKERS ?= 2

.PHONY: install demo bfcl test bench-quick docs lint clean
install: $(STAMP)

# torch comes first and alone, because deepspeed's build looks for it. Bytecode is left to the first import: most of these
# 24,000 modules are never imported, and compiling all takes a minute.
$(STAMP): pyproject.toml constraints.txt
	@echo "Making a Python environment in $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch, the largest package; minutes, by the network ..."
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	@echo "Installing hymba-align and the other packages; minutes again ..."
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	HF_HUB_OFFLINE=1 $(BIN)/hymba-align run $(RECIPE)

# The grader of BFCL, in an environment of its own, where scoring and the tests find it. BFCL_PYTHON: Python 3.10 to 3.12.
$(BFCL)/installed.json: $(STAMP) hymba_align/eval/bfcl/requirements.txt
	$(BIN)/hymba-align install-bfcl --output $(BFCL) --python $(BFCL_PYTHON)
	touch $@

bfcl: $(BFCL)/installed.json

# In the order of tests/conftest.py, which begins with the longest files.
test: install bfcl
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

bench-quick: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quick.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
