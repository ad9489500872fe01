# Two commands do everything, each with its own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BUILT := pyproject.toml CMakeLists.txt leanrec/ops/kernel.cpp  # what an installation holds a copy of

.PHONY: demo test check format clean

demo: $(VENV)/.base
	OMP_WAIT_POLICY=PASSIVE $(BIN)/leanrec demo --out demo  # threads that wait without spinning: much faster on a busy machine

test: $(VENV)/.dev
	scripts/check $(BIN)

check: test

format: $(VENV)/.dev
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	touch $@

$(VENV)/.base: $(VENV)/.torch $(BUILT)
	$(PIP) -c constraints.txt -e ".[plot]"
	touch $@

# torchrec is installed without its requirements: they would replace the CPU build of torch by a GPU build.
$(VENV)/.dev: $(VENV)/.torch $(BUILT)
	$(PIP) -c constraints.txt -e ".[dev]"
	$(PIP) -c constraints.txt --no-deps torchrec fbgemm-gpu-cpu
	touch $(VENV)/.base $@

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache
