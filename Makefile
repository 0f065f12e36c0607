# `make train` and `make test` set up everything they need in .venv; nothing else is touched.
PYTHON ?= python3
RANKS ?= 2
# Tests that run at a time; most of them wait for launchers, or compute on one core. Files stay together, and the longest come first.
WORKERS ?= 2
AT_ONCE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
VENV := .venv
# What training needs, and what the tests need besides: a first run does not wait for linters.
TRAINS := $(VENV)/.trains
READY := $(VENV)/.ready
# What makes the site of docs/.
SITE := $(VENV)/.site
MKDOCS = NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Known vulnerabilities of what is installed, by pip-audit in an environment of its own; a machine without a way there goes on.
AUDITOR := $(VENV)/audit
AUDITED = $$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
define AUDIT
{ test -x $(AUDITOR)/bin/pip-audit || { $(PYTHON) -m venv $(AUDITOR) && $(AUDITOR)/bin/pip install --quiet pip-audit; }; } >/dev/null 2>&1; \
said=$$($(AUDITOR)/bin/pip-audit --progress-spinner off --path "$(AUDITED)" 2>&1); code=$$?; \
if [ $$code = 0 ]; then echo "pip-audit: no known vulnerability in what it knows"; \
elif echo "$$said" | grep -Eq '^Found [0-9]+ known vulnerabilit'; then echo "$$said"; exit 1; \
else echo "pip-audit could not run here: $$(echo "$$said" | tail -n 1)"; fi
endef
export OMP_NUM_THREADS ?= 1
# Without bytecode every rank of every test would compile its modules anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help train test test-all lint docs docs-serve dist clean

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(TRAINS): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hvdtrain needs Python 3.10 or newer; name one: make PYTHON=python3.11")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV), 1 of 2: PyTorch and MPI from PyPI (one to three minutes the first time)"
	@$(PIP_INSTALL) --no-compile -e '.[mpi]'
	@$(VENV)/bin/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true  # as pip does, but on every CPU
	@echo "setting up $(VENV), 2 of 2: Horovod is compiled for them (one to three minutes the first time)"
	@$(VENV)/bin/hvdtrain install-horovod
	@touch $@

$(READY): $(TRAINS)
	@echo "setting up $(VENV): what the tests and linters need"
	@$(PIP_INSTALL) -e '.[dev,mpi,vision]'
	@touch $@

$(SITE): $(TRAINS)
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@

train: $(TRAINS)  ## train on the built-in digits under horovodrun, two ranks
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" horovodrun -np $(RANKS) python -m hvdtrain --run-dir runs/digits --resume never

test: $(READY)  ## run the tests (conformance on 1 to 3 ranks included); each is named when it ends
	$(VENV)/bin/python -m pytest -v $(AT_ONCE) -m "not slow" $(PYTEST_ARGS)

test-all: $(READY)  ## run the slow tests too
	$(VENV)/bin/python -m pytest -v $(AT_ONCE) $(PYTEST_ARGS)

lint: $(READY) $(SITE)  ## style, types, and whether the site of the documentation can be built
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(MKDOCS) build --strict --quiet
	@$(AUDIT)

docs: $(SITE)  ## build the site of the documentation: build/site/index.html
	$(MKDOCS) build --strict

docs-serve: $(SITE)  ## show it, and build anew what is edited
	$(MKDOCS) serve --strict

dist: $(READY)  ## build what is published: a wheel and a source archive, in dist/
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist .

clean:  ## remove what the above made
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
