# Every goal makes what it needs in .venv. A stamp file per need remembers what was installed, so that a goal waits
# only for what it uses: `make serve` never for test tools. Stamps are remade when pyproject.toml changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
PKG ?=
NAME ?=
# Threads of the test run; two keep a laptop usable and are enough to test threaded code.
TEST_THREADS ?= 2

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
TEST_ENV := OMP_NUM_THREADS=$(TEST_THREADS) MKL_NUM_THREADS=$(TEST_THREADS) TOKENIZERS_PARALLELISM=false

.PHONY: help serve test verify lint bench install clean
.DELETE_ON_ERROR:

help:
	@echo "make serve [ARGS='MODEL --port 8000']  serve a model (the embedded one) on port 8000"
	@echo "make test [PKG=engine]                 the tests, or those of one package"
	@echo "make verify [PKG=engine]               the slow checks too, and the committed results' claims"
	@echo "make lint                              ruff, mypy, import contracts"
	@echo "make bench [NAME=startup] [ARGS=...]   list the benches, or run one"
	@echo "TORCH='torch==2.13.0 --index-url ...' chooses the build of torch, PYTHON=... the interpreter"

serve: $(STAMPS)/core
	$(BIN)/tenon serve $(ARGS)

test: $(STAMPS)/test
	$(TEST_ENV) $(BIN)/python -m pytest tests/$(PKG) $(ARGS)

# Status 1 of `bench verify` is a missed target, which docs/gaps.md explains; 2 is a result that is not its script's.
verify: $(STAMPS)/test
	$(TEST_ENV) $(BIN)/python -m pytest tests/$(PKG) -m "not gpu" $(ARGS)
	@set -e; for result in bench/results/*.json; do \
		if [ -e "$$result" ] && [ -z "$(PKG)" ]; then \
			$(BIN)/tenon bench verify "$$(basename "$$result" .json)" || [ $$? -eq 1 ]; fi; \
	done

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMPS)/bench
	$(BIN)/tenon bench $(if $(NAME),run $(NAME) $(ARGS),list)

install: $(STAMPS)/core

clean:
	rm -rf $(VENV) build dist tenon.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# torch is installed first and plainly, so that its build is the one asked for; another TORCH makes another stamp.
TORCH_STAMP := $(STAMPS)/$(subst :,_,$(subst /,_,$(subst $() ,_,$(TORCH))))

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no python3.11 or python3 in PATH; set PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: $(PYTHON) is older than Python 3.11; set PYTHON=/path/to/a/newer/one" >&2; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(BIN)/python
	@echo "installing $(TORCH) (the largest part; once)"
	@$(BIN)/python -m pip --disable-pip-version-check install $(TORCH)
	@mkdir -p $(STAMPS) && touch "$@"

$(STAMPS)/core: pyproject.toml $(TORCH_STAMP)
	@echo "installing tenon"
	@$(PIP) -e .
	@touch $@

$(STAMPS)/test $(STAMPS)/lint $(STAMPS)/bench: $(STAMPS)/%: $(STAMPS)/core
	@echo "installing what make $* needs"
	@$(PIP) -e '.[$*]'
	@touch $@
