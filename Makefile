# Everything a person or a machine does with this repository. `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
# The versions the project was tested with. On a GPU machine install the torch that fits its driver into $(VENV) first, then
# `make env CONSTRAINTS=`.
CONSTRAINTS ?= -c constraints.txt
PYTEST_ARGS ?=
BENCH_ARGS ?=
EVAL_ARGS ?=

BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)
TRITON_TESTS := triton_interpret triton_compile
STAMP := $(VENV)/.installed

# One thread per process: ranks share the cores, and waiting ranks must not spin on them. Nothing is downloaded but packages.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help env quickstart eval-quick test test-cpu test-interpret test-compile check lint format gpu gpu-pretend gpu-tune gpu-ring gpu-step sanitize exactness bench parity clean

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z_-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## make the environment in .venv (nothing to do when it is there)

$(STAMP): setup.py pyproject.toml $(wildcard constraints.txt)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
	  f"mtrain needs Python 3.10 or newer, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.11 env")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q $(CONSTRAINTS) -e '.[dev,eval]'
	@touch $@

quickstart: env ## a context extension in miniature: train, extend sparsely over two ranks, compare with the dense twin
	$(BIN)/python -m mtrain quickstart

# Two replicas: the model is small, so two processes with half of the samples each are faster than two with half of each prompt.
EVALUATED := runs/quickstart/sparse/export
eval-quick: env $(EVALUATED)/config.json ## the quickstart's model on every suite at 1K to 8K, dense and sparse, offline
	$(BIN)/python -m accelerate.commands.launch --config_file recipes/accelerate/cpu_2.yaml -m mtrain eval $(EVALUATED) \
	  --suite retrieval,ruler,niah,infinitebench,pg19 --lengths 1K,2K,4K,8K --max-positions 8192 --attention both \
	  --limit 20 --replicas 2 --output runs/eval-quick $(EVAL_ARGS)

$(EVALUATED)/config.json: | env
	$(BIN)/python -m mtrain quickstart

test: env test-cpu test-interpret test-compile ## every test that can run on this machine (README's test command; CI runs it)

# Triton decides once per process whether kernels are interpreted or compiled, hence three runs. Without triton the last two
# report their files as skipped.
test-cpu: env
	$(PYTEST) $(foreach folder,$(TRITON_TESTS),--ignore=tests/$(folder)) tests

test-interpret: env ## the Triton kernels in Triton's interpreter, on the CPU
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 $(PYTEST) tests/triton_interpret

test-compile: env ## the Triton kernels compiled for GPUs that need not be here
	env -u TRITON_INTERPRET $(PYTEST) tests/triton_compile

check: lint ## before a commit: lint, types and the quick tests
	$(PYTEST) -m "not slow and not gpu" $(foreach folder,$(TRITON_TESTS),--ignore=tests/$(folder)) tests

lint: env ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env ## wrap and sort as ruff does
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

gpu: env ## on a CUDA device: its tests, then the benchmark of the kernels (gpu-tune, gpu-ring and gpu-step measure more)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS) tests
	$(BIN)/python scripts/bench_kernels.py $(BENCH_ARGS)

gpu-pretend: env ## without one: its tests in small on a pretended device (minutes; proves lines and results, never speed)
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 $(PYTEST) -p tests.pretend_cuda_plugin tests/gpu

gpu-tune: env ## on a CUDA device: other launch shapes against those of the kernels' table
	$(BIN)/python scripts/tune_kernels.py $(BENCH_ARGS)

gpu-ring: env ## on a CUDA device: one attention layer of a 4 x 8 ring, rank by rank, and what clusters would make of it
	$(BIN)/python scripts/ring_trace.py $(BENCH_ARGS)

gpu-step: env ## on a CUDA device: a whole training step, dense against vertical-slash
	$(BIN)/python scripts/bench_step.py $(BENCH_ARGS)

sanitize: env ## every GPU kernel on a small case under compute-sanitizer (comes with the CUDA toolkit)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 $(BIN)/python -m tests.gpu.small_case

exactness: env ## print the exactness matrix: every pattern, layout, schedule and topology against the float64 truth
	$(BIN)/python scripts/exactness.py

bench: env ## print the benchmarks: CPU kernels against dense attention, and the balancer
	$(BIN)/python scripts/bench_cpu.py
	$(BIN)/python scripts/bench_balance.py

parity: env ## the published experiment in small: dense, sparse and control attention, trained and evaluated (half an hour of CPU)
	$(BIN)/python -m scripts.parity --write

clean: ## remove what can be made again, the environment excepted
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -exec rm -rf {} +
