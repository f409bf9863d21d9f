# Perseid. `make serve` and `make test` set everything up by themselves; `make help` lists the rest.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
ARGS    ?=
TESTS   ?= tests
PIP     := $(BIN)/python -m pip --disable-pip-version-check
OR_NONE := || [ $$? -eq 5 ]  # pytest's status where a folder has no tests of the kind
SERVE_READY := $(VENV)/.ready-to-serve
DEV_READY   := $(VENV)/.ready-to-develop

# Without a C++ compiler, one comes as a Python package.
COMPILER := $(if $(shell command -v c++ || command -v g++ || command -v clang++),,[compiler])

# The example adapters, their gates and the heads belong to the embedded base; another --model starts without them.
EXAMPLES := $(foreach folder,$(wildcard examples/adapters/* examples/gates/*),--adapter $(notdir $(folder))=$(folder)) \
	$(foreach folder,$(wildcard examples/heads/*),--adapter $(notdir $(folder))-heads=$(folder))
ADAPTERS := $(if $(findstring --model,$(ARGS)),,$(EXAMPLES))

.DEFAULT_GOAL := help
.PHONY: help serve test test-fast chaos fuzz lint format protos bench profile bench-kernels bench-gpu examples examples-gates examples-eval examples-heads router-bench router-eval router-scale speculation-eval capacity soak clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

serve: $(SERVE_READY)  ## set up on the first run, then serve the embedded base and the example adapters (ARGS="…")
	@$(BIN)/perseid serve $(ADAPTERS) $(ARGS)

test: $(DEV_READY)  ## set up, then run all tests (TESTS=… narrows)
	$(BIN)/python -m pytest -m e2e $(TESTS) $(OR_NONE)
	$(BIN)/python -m pytest -m "not e2e" -n 2 --dist loadfile $(TESTS) $(OR_NONE)

test-fast: $(DEV_READY)  ## only the tests that need no base model
	$(BIN)/python -m pytest -m "not e2e" -n 2 --dist loadfile $(TESTS)

chaos: $(DEV_READY)  ## faults against the real small model under load: kills, hangs, full disks, overload (minutes)
	$(BIN)/python -m pytest -m chaos $(TESTS)

fuzz: $(DEV_READY)  ## ten thousand hostile calls and files, counted; FUZZ_SEED=… FUZZ_SCALE=… for others and more
	$(BIN)/python -m pytest -m fuzz $(ARGS) tests/fuzz

lint: $(DEV_READY)  ## style, types, import layers, protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint

format: $(DEV_READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(DEV_READY)  ## generate the gRPC stubs anew
	$(BIN)/python -m perseid_protos.generate

bench: $(DEV_READY)  ## decode and prefill speed here, PEFT (and --peer NAME=URL) beside it in the same rounds (ARGS="…")
	$(BIN)/python -m perseid_loadtest.offline $(ARGS)

profile: $(DEV_READY)  ## where each millisecond of a decode step goes, on a CPU (ARGS="…")
	$(BIN)/python -m perseid_loadtest.step_profile $(ARGS)

bench-kernels: $(DEV_READY)  ## each op against its roofline on this machine (ARGS="…")
	$(BIN)/python -m perseid_kernels.bench.kernels $(ARGS)

bench-gpu: $(DEV_READY)  ## the whole GPU suite, within nine minutes; needs a GPU (ARGS="…")
	$(BIN)/python -m perseid_kernels.bench.gpu $(ARGS)

examples: $(DEV_READY)  ## train the example adapters anew (hours on two cores)
	$(BIN)/python examples/train.py --out examples/adapters $(ARGS)

examples-gates: $(DEV_READY)  ## train the gates of the example adapters anew (minutes)
	$(BIN)/python examples/train_gates.py $(ARGS)

examples-heads: $(DEV_READY)  ## train the shipped Medusa heads anew (about an hour on two cores)
	$(BIN)/python examples/train_heads.py $(ARGS)

examples-eval: $(DEV_READY)  ## score the base and every example adapter on held-out items through a server
	$(BIN)/python examples/evaluate.py $(ARGS)

router-bench: $(DEV_READY)  ## what routing costs a decode step, beside adapters asked for by name (ARGS="…")
	$(BIN)/python -m perseid_loadtest.routed_step $(ARGS)

router-eval: $(DEV_READY)  ## score auto beside the base and every adapter; tables into docs/routing.md (ARGS=--quick)
	$(BIN)/python examples/router_eval.py $(ARGS)

router-scale: $(DEV_READY)  ## accuracy and step cost of gates over 4 to 64 adapters; table into docs/routing.md (ARGS=--quick)
	$(BIN)/python examples/router_scale.py $(ARGS)

speculation-eval: $(DEV_READY)  ## speculation: lossless, acceptance, speed; tables into docs/speculation.md (ARGS="speed", --quick)
	$(BIN)/python examples/speculation_eval.py $(ARGS)

capacity: $(DEV_READY)  ## the highest rate within limits on latency: the base, 8 adapters, 100 adapters (minutes; ARGS="…")
	$(BIN)/python -m perseid_loadtest.capacity $(ARGS)

soak: $(DEV_READY)  ## ten minutes at 80 % of capacity while adapters come and go: errors, memory, answers (ARGS="--minutes 30")
	$(BIN)/python -m perseid_loadtest.soak $(ARGS)

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Perseid needs Python 3.11 or newer; name one with: make PYTHON=python3.11 …" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "No virtual environment could be made; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(SERVE_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Perseid into $(VENV) (once; a few minutes, mostly torch) …"
	$(PIP) install --quiet --progress-bar on -c constraints.txt -e ".[loadtest,tracing,train]" -e ".$(COMPILER)"
	@touch $@

$(DEV_READY): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Perseid and its development tools into $(VENV) (once) …"
	$(PIP) install --quiet --progress-bar on -c constraints.txt -e ".[dev,examples]" -e ".$(COMPILER)"
	@touch $@ $(SERVE_READY)
