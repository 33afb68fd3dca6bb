# make fast | test | newest | lint | docs | bench | bench-align ...; PYTHON picks the interpreter
PYTHON ?= python
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
SPREAD = -n 2 --dist loadfile # one thread each; a file stays whole, for what its tests share
BENCHMARKS = merge merge_end_to_end align align_quality represent train

NEWEST = build/newest/bin/python

.PHONY: fast test newest lint docs format bench
fast:
	$(PYTHON) -m pytest $(SPREAD) -m "not slow and not install and not distributed and not browser"

test:
	$(PYTHON) -m pytest $(SPREAD)

newest: # versions that setup.cfg allows, in place of constraints.txt's; below numpy 2.4, which mistral-common asks for
	test -x $(NEWEST) || $(PYTHON) -m venv build/newest
	$(NEWEST) -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[test]' 'numpy<2.4'
	$(MAKE) fast PYTHON=$(NEWEST)
	$(NEWEST) -m pytest $(SPREAD) -m slow tests/test_training*.py tests/test_trainer*.py

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
