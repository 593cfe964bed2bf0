# CoE Gateway: the commands of the README. `make help` lists them.
PYTHON ?= python3.11
VENV ?= .venv
CONFIG ?= examples/quickstart/coe.yaml
PY := $(VENV)/bin/python
LOCK := requirements/cpu.lock
# Named after the lock's content: another lock is another stamp, so an old environment is completed.
STAMP := $(VENV)/.installed-$(firstword $(shell cksum $(LOCK) pyproject.toml | cksum))
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export PYTHONWARNINGS ?= ignore

.PHONY: help setup models serve check test bench sim lint types audit lock clean

help:            ## show this list
	@grep -E '^[a-z]+: .*## |^[a-z]+:  *## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## create the environment

$(STAMP): $(LOCK) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed ($(PYTHON) was not found). Debian: apt-get install python3.11 python3.11-venv, or make PYTHON=/path/to/python3.11"; exit 1; }
	@avail=$$(df -Pk . | awk 'NR==2 {print $$4}'); [ "$$avail" -gt 7000000 ] || { echo "Too little disk space: the environment and the models need about 7 GB here, $$((avail / 1000)) MB are free."; exit 1; }
	@echo "[setup 1/3] environment in $(VENV)"
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Creating the environment failed. Debian: apt-get install python3.11-venv"; exit 1; }; }
	@n=$$(grep -c '==' $(LOCK)); echo "[setup 2/3] installing $$n pinned packages (about 4 GB unpacked; 2 to 4 minutes)"; \
	start=$$(date +%s); ( while sleep 15; do echo "            $$(( $$(date +%s) - start )) s, $$(du -sm $(VENV) | cut -f1) MB of about 4300 in place"; done ) & watch=$$!; \
	trap 'kill $$watch 2>/dev/null' EXIT; \
	PYTHONUNBUFFERED=1 $(PY) -m pip install --disable-pip-version-check --no-deps --progress-bar off -r $(LOCK) 2>$(VENV)/pip.err | \
	  awk -v n=$$n '/^(Collecting|Processing|Requirement already satisfied)/ {c++; if (c % 20 == 0 || c == n) {printf "            %d of %d packages fetched\n", c, n; fflush()}} /^Installing collected/ {print "            unpacking"; fflush()}'; \
	$(PY) -c 'import importlib.metadata as m, re, sys; want = dict(l.strip().split("==") for l in open("$(LOCK)") if "==" in l and not l.startswith("#")); norm = lambda s: re.sub(r"[-_.]+", "-", s).lower(); have = {norm(d.metadata["Name"]): d.version for d in m.distributions()}; miss = [k for k, v in want.items() if have.get(norm(k)) != v]; sys.exit("not installed: " + ", ".join(miss) if miss else 0)' \
	  || { cat $(VENV)/pip.err; echo "Installing failed (above). If it is torch: pip has to know PyTorch's CPU wheel index. Run make again; it goes on where it stopped."; exit 1; }; \
	echo "            installed in $$(( $$(date +%s) - start )) s"
	@echo "[setup 3/3] the project itself"
	@$(PY) -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed-*; touch $@

models: $(STAMP) ## prepare the quickstart's models (once)
	@$(PY) examples/quickstart/prepare_models.py

# An expert that cannot be prepared (status 2: the rest could) is out of service; the others serve.
serve: $(STAMP)  ## set everything up and serve the quickstart on port 8000
	@$(PY) examples/quickstart/prepare_models.py || [ $$? -eq 2 ]
	@exec $(VENV)/bin/coe serve --config $(CONFIG) $(SERVE_FLAGS)

lint: $(STAMP)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/lint-imports

types: $(STAMP)
	@$(VENV)/bin/mypy

# One thread each: two workers with two OpenMP threads wait for each other on a busy machine.
check: lint types ## fast checks: lint, types, imports, unit, property, simulation, in-process contract
	@$(PY) requirements/audit.py --advisory
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile tests/unit tests/property tests/sim tests/contract

test: check models ## everything: check, then real Valkey, Ray cluster and vLLM engine
	@$(PY) -m pytest tests/integration tests/chaos

audit: $(STAMP)  ## check the locked packages for known vulnerabilities
	@$(PY) requirements/audit.py

sim: $(STAMP)    ## the long simulation
	@COE_SIM_SEEDS=10000 $(PY) -m pytest -q tests/sim

# Not among them: what needs a GPU, recorded outcomes (--data DIR) or half an hour.
bench: models    ## every benchmark; one JSON file each in results/
	@mkdir -p results; for b in bench/[a-z]*.py; do \
	  case $$b in bench/gpu_*|bench/_*|bench/soak.py|bench/memory.py|bench/cascade_routing.py|bench/served_cascade.py|bench/routing_quality.py|bench/routing_ceilings.py|bench/routing_signals.py|bench/routing_inputs.py|bench/category_quality.py|bench/simulation.py) continue;; esac; \
	  echo "== $$b"; $(PY) $$b --json results/$$(basename $$b .py).json || exit 1; done

lock: $(STAMP)   ## renew requirements/cpu.lock from the *.in files (in a scratch environment)
	@sh requirements/lock.sh

clean:           ## remove the environment (models stay in the cache)
	@rm -rf $(VENV) .venv-audit results build *.egg-info
