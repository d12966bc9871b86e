# `make demo` and `make test` set everything up by themselves; see CONTRIBUTING.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LINT_SITE := .lint/site
FRESH := .fresh
OLDEST := $(VENV)/triton-3.6
VISION := $(VENV)/vision

.PHONY: install demo test test-fast coverage lint docs build test-build clean

install: $(READY)

# Reinstalled when the project's requirements change; the marker is written last.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[demo,dev,docs,examples,peers]' \
	  diffusers peft
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m frog_triton demo

# The oldest supported Triton, beside the pinned one, for a test that compiles with it.
$(OLDEST): $(READY)
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target $(OLDEST) triton==3.6.0
	touch $(OLDEST)

# Aside, since transformers imports torchvision wherever it finds it, and torchvision's
# build for CUDA cannot be imported beside a torch for the CPU.
$(VISION): $(READY)
	rm -rf $(VISION)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --constraint constraints.txt --target $(VISION) timm torchvision
	touch $(VISION)

test: $(READY) $(OLDEST) $(VISION)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# What an edit is most likely to break, in under a minute; needs no network once set up.
test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m fast

# The table of what FROG preconditions of real models.
coverage: $(READY) $(VISION)
	PYTHONPATH=$(VISION) $(BIN)/python -m frog_triton bench coverage \
	  --write benchmarks/results/coverage.md

# Type checkers cannot follow the package mapping of an editable install, so mypy
# checks a copy that is installed aside.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	rm -rf $(LINT_SITE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target $(LINT_SITE) .
	MYPYPATH=$(LINT_SITE) $(BIN)/mypy --package frog_triton

# The documentation, in site/; a link that leads nowhere is an error.
docs: $(READY)
	$(BIN)/mkdocs build --strict

# The source distribution, and the wheel that is built from it, in dist/.
build: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# As whoever downloads a release: a new environment with the source distribution in it,
# whose own tests run. TESTS chooses other ones.
TESTS ?= -m fast
test-build: build
	rm -rf $(FRESH)
	$(PYTHON) -m venv $(FRESH)/venv
	$(FRESH)/venv/bin/pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt "$$(echo dist/*.tar.gz)[demo,dev]"
	tar --extract --directory $(FRESH) --file dist/*.tar.gz
	cd $(FRESH)/frog_triton-* && ../venv/bin/pytest -n 2 $(TESTS)

clean:
	rm -rf $(VENV) $(FRESH) .lint dist runs site
