# Two commands do everything: `make rehearsal` and `make test`. Each makes its own environment from python3 and PyPI.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ENGINE ?= simulated
UI ?= 0

.PHONY: rehearsal test lint venv clean

rehearsal: $(VENV)/.installed  ## the whole rollout on this machine; ENGINE=vllm for real vLLM on the CPU, UI=1 keeps the Prefect UI open
	$(BIN)/llm-rollout rehearse --engine $(ENGINE) $(if $(filter 1,$(UI)),--ui,)

test: $(VENV)/.installed lint  ## lint, types, layers and all tests
	$(BIN)/pytest --maxfail=5 --durations=15

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache

venv: $(VENV)/.installed

# The stamp is newer than pyproject.toml exactly when the installed packages are what it asks for.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "llm-rollout needs Python 3.11 or newer: make PYTHON=python3.12 …" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[rehearsal,test]'
	touch $@

clean:
	rm -rf out $(VENV)
