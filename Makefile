# make fast | test | lint | bench | bench-align ...; PYTHON picks the interpreter
PYTHON ?= python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
BENCHMARKS = merge merge_end_to_end align align_quality represent train

.PHONY: fast test lint format bench
fast:
	$(PYTHON) -m pytest -m "not slow and not install and not distributed and not browser"

test:
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: $(BENCHMARKS:%=bench-%)

bench-%:
	$(PYTHON) -m tests.benchmarks.bench_$*
