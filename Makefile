# make demo and make test do all their own set-up, in .venv; `make setup PYTHON=python3.12` chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test stress lint docs bench aot clean

setup: $(READY)

# Installed again only when pyproject.toml changes.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lpvit needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(READY)

demo: setup
	$(BIN)/lpvit run digits_vit --output runs/demo
	@echo
	$(BIN)/lpvit predict runs/demo/export/model.onnx examples/digit_3.png

# A process for each core, each with one thread.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal

# What lpvit promises under kills, damage and hostile input, tried ten thousand times; `make test` tries a sample. It takes long:
# STRESS=tests/stress/test_stress_files.py, or any one test, is a part.
STRESS ?= tests/stress
stress: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest '$(STRESS)'

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Writes docs/recipe.md from the schema and builds the site in site/; a dead link is an error.
docs: .venv/.docs-ready
	$(BIN)/python scripts/make_docs.py
	$(BIN)/mkdocs build --strict

.venv/.docs-ready: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

bench: setup
	$(BIN)/python scripts/bench_kernels.py --device cpu --threads 1 --output benchmarks/results/kernels_cpu.json
	$(BIN)/python scripts/bench_mfac.py --output benchmarks/results/mfac_cpu.json
	$(BIN)/lpvit run digits_vit --output runs/bench --no-resume --json > benchmarks/results/digits_vit_cpu.json

# What the compiler makes of the GPU kernels, for compute capability 8.0 and 9.0; needs no GPU.
aot: setup
	$(BIN)/python -m lpvit_kernels.aot > benchmarks/results/aot.txt

clean:
	rm -rf .venv runs/demo runs/bench build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
