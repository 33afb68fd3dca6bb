# make fast | test | lint | docs | bench | bench-align ...; PYTHON picks the interpreter
PYTHON ?= python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
SPREAD = -n 2 --dist loadfile # one thread each; a file stays whole, for what its tests share
BENCHMARKS = merge merge_end_to_end align align_quality represent train

.PHONY: fast test lint docs format bench
fast:
	$(PYTHON) -m pytest $(SPREAD) -m "not slow and not install and not distributed and not browser"

test:
	$(PYTHON) -m pytest $(SPREAD)

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet --site-dir build/site

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: $(BENCHMARKS:%=bench-%)

bench-%:
	$(PYTHON) -m tests.benchmarks.bench_$*
