# `make demo` and `make test` each set up what they need; nothing has to be installed beforehand but Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL := .cache/tiny

.PHONY: demo test test-long lint format clean

# pip 23.2, the one that Debian's Python 3.11 brings, cannot resolve modular's dependencies.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/test-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

$(DEMO_MODEL): | $(VENV)/installed
	mkdir -p $(dir $@)
	$(BIN)/python -m step3p5.random_checkpoint $@ --preset tiny

demo: $(VENV)/installed $(DEMO_MODEL)
	$(BIN)/max generate --model $(DEMO_MODEL) --custom-architectures pipelines_registry --devices cpu \
		--max-length 512 --max-new-tokens 64 --prompt "Why is the sky blue?"

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	.ci/check-mojo-format $(BIN)/mojo mojo_kernels/*.mojo

format: $(VENV)/test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mojo format --quiet mojo_kernels/*.mojo

test: lint
	$(BIN)/python -m pytest

# The graph for several devices: run on the CPU, compiled for GPUs of each kind, no GPU needed; long speculated answers.
# A line a case, its seconds at the end. On 2 cores 50 minutes in all, of which the CPU runs take 10 and each kind and
# number of GPUs 3 (MI300X) to 11.
test-long: $(VENV)/test-installed
	STEP3P5_LONG_TESTS=1 $(BIN)/python -m pytest --verbose --durations=0 \
		tests/test_parallel_graph.py tests/test_gpu_compile_long.py tests/test_speculation_long.py

clean:
	rm -rf $(VENV) .cache dist
