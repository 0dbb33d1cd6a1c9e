# make demo      set up and run the quickstart: a real model, a real mixture, one merged model
# make test      set up and run the tests (make test-all: the slow ones too)
# make browser   install Chromium, which the tests of the report open, where there is none (Debian, Ubuntu)
# make slurm     install Slurm and munge, which the tests of the launchers start, where there are none (Debian, Ubuntu)
# make quality   lint, format, types, import directions
# make bench     all benchmarks, one after another, into benchmarks/results; each by itself: make bench-quickstart (the
#                quickstart's numbers), bench-merge (the merge against the disk and mergekit), bench-scale (ten thousand
#                datasets), bench-planner (gradients, sketches, memory, processes),
#                bench-training (the cost beside plain TRL)
# make recipes   small copies of all recipes, into recipes/README.md, and what each recipe would cost
# make screenshots  docs/tour.md and its pictures, from a finished quickstart

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUN ?= runs/quickstart
# What planner_scale.py measures is part of the planner's page.
BENCHMARKS := quickstart merge training scale planner

.PHONY: demo test test-slow test-all browser slurm bench $(BENCHMARKS:%=bench-%) recipes screenshots quality format clean

# torch first and by its exact version: a range would let pip take the newest release with all of CUDA.
$(VENV)/base.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/demo.done: $(VENV)/base.done recipes/quickstart/requirements.txt recipes/quickstart/requirements-no-deps.txt
	$(PIP) --editable ".[demo]" --requirement recipes/quickstart/requirements.txt
	$(PIP) --no-deps --requirement recipes/quickstart/requirements-no-deps.txt
	touch $@

$(VENV)/dev.done: $(VENV)/base.done
	$(PIP) --editable ".[dev,mergekit,eval,slurm]"
	touch $@

demo: $(VENV)/demo.done
	$(BIN)/python recipes/quickstart/demo.py --output $(RUN)

test: $(VENV)/dev.done $(VENV)/demo.done
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/dev.done $(VENV)/demo.done
	$(BIN)/python -m pytest -m slow

test-all: test test-slow

browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do command -v $$name && exit; done; \
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	$$sudo apt-get update && $$sudo apt-get install --yes --no-install-recommends chromium

slurm:
	@command -v sbatch && command -v /usr/sbin/slurmctld && command -v /usr/sbin/slurmd && command -v /usr/sbin/munged && exit; \
	sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); export DEBIAN_FRONTEND=noninteractive; \
	$$sudo apt-get update && $$sudo apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge

# Never two at a time, whatever -j says: each would measure the other.
bench:
	@for name in $(BENCHMARKS); do $(MAKE) bench-$$name || exit 1; done

# A finished quickstart, of whatever age.
$(RUN)/run/evaluation.json:
	$(MAKE) demo

bench-quickstart: $(VENV)/demo.done $(RUN)/run/evaluation.json
	$(BIN)/python benchmarks/quickstart_checks.py $(RUN) --output benchmarks/results/quickstart.md

bench-merge: $(VENV)/demo.done $(VENV)/dev.done $(RUN)/run/evaluation.json
	$(BIN)/python benchmarks/merge_speed.py $(RUN) --output benchmarks/results/merge.md

# bergson brings a torchvision that does not load beside torch's CPU build: it gets a folder of its own.
bench-planner: $(VENV)/demo.done $(VENV)/dev.done
	test -d .bergson || $(PIP) --no-deps --target .bergson --requirement benchmarks/requirements-bergson.txt
	$(BIN)/python benchmarks/planner.py $(RUN) --bergson .bergson --output benchmarks/results/planner.md

bench-scale: $(VENV)/dev.done
	$(BIN)/python benchmarks/planner_scale.py --output benchmarks/results/planner_scale.md

bench-training: $(VENV)/demo.done
	$(BIN)/python benchmarks/training_overhead.py $(RUN) --output benchmarks/results/training.md

recipes: $(VENV)/dev.done
	$(BIN)/python recipes/check.py

# The tour and the pictures of the report, from a finished quickstart.
screenshots: $(VENV)/dev.done
	$(BIN)/python docs/make_tour.py $(RUN)/run

quality: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
