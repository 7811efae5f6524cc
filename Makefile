# Everything runs in a virtual environment that the first target makes; nothing else is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What must hold on every supported Megatron-Core; the rest does not depend on its version (`ops/`
# does not import it).
CORE_TESTS := tests/model/test_draft_model.py tests/model/test_layer_spec.py \
	tests/training/test_training.py tests/training/test_overlap.py tests/run/test_checkpoints.py \
	tests/run/test_identity.py tests/targets/huggingface/test_sharded_target.py tests/megatron_lm

# Each worker has its own rank processes, and a rank computes in one thread. A file stays with one
# worker, so that what its tests share is made once. Hundreds of processes start, so bytecode is kept
# even where the environment says otherwise.
WORKERS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: quickstart quickstart-long test test-fast test-core faults gpu-check lint format package docs clean

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart/quickstart.py

# The same with more steps: about an hour on two cores. A second start goes on where it was stopped.
quickstart-long: $(VENV)/.installed
	$(BIN)/python examples/quickstart/quickstart.py --long

test: $(VENV)/.installed
	$(WORKERS)

# All that needs neither torchrun nor ranks, and the draft on ranks.
test-fast: $(VENV)/.installed
	$(WORKERS) -m "not slow"

test-core: $(VENV)/.installed
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m "not commands" $(CORE_TESTS)

# The faults of docs/reliability.md, in runs/faults/faults.json: 20 minutes on two quiet cores.
# SOAK=10: kills at random places for ten minutes instead.
faults: $(VENV)/.installed
	$(BIN)/python tools/inject_faults.py $(if $(SOAK),--soak-minutes $(SOAK))

# From a plain checkout, with the Python that has PyTorch for the GPU; WHEELS=DIR: made by
# tools/gpu_wheels.sh DIR where there is a network, for a machine without one.
gpu-check:
	$(PYTHON) tools/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS))

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy dspark_megatron

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A source archive and a wheel in dist/, for the version of dspark_megatron/__init__.py.
package: $(VENV)/.installed
	rm -rf build dist
	$(BIN)/python -m build

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[data,dev,quickstart]"
	touch $@

# The pages of docs/, with a search and a reference of keys and API, in site/. Dead links fail.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(VENV)/.docs: setup.py constraints.txt $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) runs site
