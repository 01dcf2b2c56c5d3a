# make demo    set up all that is needed and show the main job, end to end
# make test    set up all that is needed and run the whole suite (25 min)
# make bench   measure against the targets (BENCH_ARGS=--quick, or names; see tests/bench)
# make chaos   kill and break everything around 200 jobs; writes docs/failures.md (12 min; CHAOS_ARGS="--seed N")
# make test-vm the systemd and service tests on cgroup v2, in an emulated Debian: PART=v2 (3 min),
#              core (12 min; the default), all (an hour and a half); SUITE=trixie
# make attack  the part of it with hostile jobs, masters and neighbours (8 min)
# make fuzz    a million hostile jobs against all that is made of a job (FUZZ_ARGS="--count N --seed S")
# make lint    ruff and mypy
# make setup   .venv/bin/ffmpeg-worker, and the packages of the distribution it needs
# make wheels  build/wheels: the project and all it needs at run time, to install without network
# make clean   remove what the others made

PY := .venv/bin/python
PIP := $(PY) -m pip --quiet --quiet --disable-pip-version-check --no-input
PYTEST_ARGS ?=
BENCH_ARGS ?=
CHAOS_ARGS ?=
FUZZ_ARGS ?=
SUITE ?= bookworm
PART ?= core
export PIP_ROOT_USER_ACTION := ignore

.PHONY: setup wheels demo test attack chaos test-vm bench fuzz lint clean as-root

# Said at once, not after minutes of setup.
as-root:
	@[ "$$(id -u)" = 0 ] || { echo "make: run this as root: it boots a systemd, or uses the machine's." \
	  "Without root: make setup, make lint, .venv/bin/python -m pytest" >&2; exit 1; }

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh

# In two steps: the dependencies change seldom and need the network.
wheels: build/wheels/.project

build/wheels/.dependencies: pyproject.toml constraints.txt | .venv/.ready
	@echo "wheels: the run-time dependencies"
	@rm -rf build/wheels && mkdir -p build/wheels
	@$(PIP) wheel -c constraints.txt -w build/wheels .
	@touch $@

build/wheels/.project: build/wheels/.dependencies $(wildcard README.md worker/*.py worker/*/*.py)
	@echo "wheels: the project"
	@rm -f build/wheels/ffmpeg_worker-*.whl
	@$(PIP) wheel --no-deps -w build/wheels .
	@touch $@

demo: as-root setup wheels
	@$(PY) scripts/demo.py

# Every part runs, also after one has failed. Inside the bed this folder is read-only: no cache there.
test: as-root setup wheels
	@status=0; \
	echo "== unit tests and tests on a mocked bus"; \
	$(PY) -m pytest $(PYTEST_ARGS) tests/unit tests/bus || status=1; \
	echo "== the test bed itself"; \
	$(PY) -m pytest $(PYTEST_ARGS) tests/bed || status=1; \
	echo "== on a real systemd"; \
	$(PY) tests/bed/bed.py run -- \
	  $(PY) -m pytest -p no:cacheprovider $(PYTEST_ARGS) tests/system tests/e2e tests/chaos \
	  || status=1; \
	echo "== attacks on a real systemd"; \
	$(PY) tests/bed/bed.py run -- $(PY) -m pytest -p no:cacheprovider $(PYTEST_ARGS) tests/attack \
	  || status=1; \
	exit $$status

attack: as-root setup
	@$(PY) tests/bed/bed.py run -- $(PY) -m pytest -p no:cacheprovider $(PYTEST_ARGS) tests/attack

# What it writes is a document only if nothing was wrong.
chaos: as-root setup
	@mkdir -p build/chaos
	@$(PY) tests/bed/bed.py run --bind $(CURDIR)/build/chaos -- \
	  $(PY) -m tests.chaos --write $(CURDIR)/build/chaos $(CHAOS_ARGS)
	@cp build/chaos/failures.md docs/failures.md

test-vm: as-root setup
	@$(PY) tests/bed/vm.py test --suite $(SUITE) --part $(PART) $(if $(PYTEST_ARGS),-- $(PYTEST_ARGS))

bench: as-root setup
	@$(PY) -m tests.bench --out $(CURDIR)/build/bench/bench.tsv $(BENCH_ARGS)

# Needs no root: nothing is started.
fuzz: setup
	@$(PY) -m tests.fuzz $(FUZZ_ARGS)

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
