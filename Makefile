# make demo, make corpus, make study, make test, make lint, make docs: each sets itself up in .venv first.
PYTHON ?= python3
VENV ?= .venv
RESULTS ?= runs/study_results
RUN := $(VENV)/bin/python

.PHONY: demo corpus study test laws lint docs clean

demo: $(VENV)/demo.stamp
	$(RUN) -m experiments.ablate --config=configs/ablation/demo.py --workdir=runs/demo

corpus: $(VENV)/demo.stamp
	$(RUN) -m experiments.corpus --output=corpus

# half a day on two cores; resumes where it was interrupted
study: $(VENV)/demo.stamp
	test -d corpus/bytes || $(MAKE) corpus
	$(RUN) -m experiments.study --workdir=runs/study --results=$(RESULTS)
	$(RUN) -m experiments.report $(RESULTS)

test: $(VENV)/peers.stamp
	$(RUN) -m pytest

laws: $(VENV)/dev.stamp
	$(RUN) -m pytest tests/laws/test_balance_laws.py tests/laws/test_dispatch_laws.py tests/test_routing.py \
	  tests/dispatch/test_dispatch.py tests/text/test_decoding.py

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

$(VENV)/demo.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.11 (or newer)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# torch, transformers and lm_eval, which some tests compare with
$(VENV)/peers.stamp: $(VENV)/dev.stamp
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev,peers]'
	@touch $@

# docstrings are read and never imported: with these two packages alone the site is built without jax
$(VENV)/docs.stamp: $(VENV)/demo.stamp
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) runs site
