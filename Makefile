# SFT Lab. A fresh machine needs Python 3.11, 3.12 or 3.13 with venv, and make; `make` alone lists the targets.
# A CPU-only torch saves some gigabytes: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make run

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help first run lab test test-precision test-all browser lint docs render ja constraints

# Python 3.11 is tried before its followers because the versions in constraints.txt were tested on it.
CHECK_PYTHON := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c '$(CHECK_PYTHON)' 2>/dev/null && echo $$p && break; done)

# A kernel started by .venv/bin/... is the .venv's own; the path is for the programs that notebooks and deepspeed call
# by name (deepspeed, ninja, sftlab).
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

# Packages built from source (deepspeed, the lab itself) get their build tools from constraints.txt too; the second
# name is how pip 25.3 and later want it said, and pip before 23.1 must be told to build them the same way.
PIP_INSTALL := -m pip install --no-input --disable-pip-version-check
PINNED_BUILD := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_USE_PEP517=1

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1|\2/p' Makefile | while IFS='|' read -r target what; do \
		printf '%-24s %s\n' "$$target" "$$what"; done

# The page is opened where there is a screen; its name is printed in any case.
first: .venv/installed  ## run notebook 00 on this CPU and open its page
	@out="runs/first-$$(date +%Y%m%d-%H%M%S)"; page="$(CURDIR)/$$out/00_start_here.html"; \
	$(IN_VENV) sftlab run notebooks/00_start_here.ipynb --profile cpu --output-dir "$$out" || exit $$?; \
	if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ]; then \
		.venv/bin/python -m webbrowser -t "file://$$page" >/dev/null 2>&1 || true; \
	fi; \
	echo "The notebook with its results: $$page"; \
	echo "Next: make lab opens the course in JupyterLab."

run: .venv/installed  ## run every notebook on this CPU, results in runs/<time>
	$(IN_VENV) sftlab run notebooks --profile cpu

# No test needs the Hub, so none may reach for it: tests/no_network cuts the notebooks' kernels off as it does tests.
# Two processes of one thread each: threads of several processes on the same cores wait for each other.
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: lint  ## lint, unit tests, and every notebook at its smallest size
	$(IN_VENV) pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(RUN_NOTEBOOKS)

# Float32 in `test`, bfloat16 in `test-precision`, so that both run on any CPU. A CPU without instructions for bfloat16
# emulates it, which takes longer. The unit tests name the precision that they are about, and run in both. Each open
# exercise is solved by its folded solution, and its wrong answers are tried.
RUN_NOTEBOOKS = $(IN_VENV) SFTLAB_BF16=$(BF16) SFTLAB_PROFILE=smoke SFTLAB_SOLUTIONS=1 PYTHONPATH="$(CURDIR)/tests/no_network" \
	pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-cell-timeout=300 --ignore=notebooks/ja notebooks/
test: BF16 = 0
test-precision: BF16 = 1
test-precision: export HF_HUB_OFFLINE = 1
test-precision: export OMP_NUM_THREADS = 1
test-precision: .venv/installed  ## every notebook at its smallest size, in the precision that `make test` leaves out
	$(RUN_NOTEBOOKS)

test-all: export HF_HUB_OFFLINE = 1
test-all: export OMP_NUM_THREADS = 1
test-all: test test-precision  ## both, and the tests marked `slow`, which take many minutes
	$(IN_VENV) pytest -n 2 --dist loadfile -m slow

lab: .venv/installed  ## open the course in JupyterLab
	$(IN_VENV) jupyter lab notebooks/00_start_here.ipynb

# Debian's and Ubuntu's package where one may install it; Playwright's own download elsewhere, which needs more network.
browser: .venv/installed  ## a Chromium for the tests of forms and panels, unless there is one
	@.venv/bin/python -c 'from tests.browser import find_chromium as f; import sys; p = f(); print(p or ""); sys.exit(not p)' \
	|| { [ "$$(id -u)" = 0 ] && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-noto-cjk >/dev/null; } \
	|| .venv/bin/playwright install chromium

lint: .venv/installed  ## check style, formatting, and which module imports which
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) lint-imports

docs: .venv/installed  ## write docs/reference.md again, from the options of the commands
	$(IN_VENV) python docs/make_reference.py
	$(IN_VENV) python -m tests.families

render: .venv/installed  ## run the notebooks whose stored outputs are stale, and store what they put out
	$(IN_VENV) python -m sftlab.course.stored

ja: .venv/installed  ## write the Japanese edition, notebooks/ja, from the notebooks and its catalogues
	$(IN_VENV) python docs/make_ja.py

# The pins come from a real install in an empty environment. torch is named by version because a bare `torch` takes
# the newest release; its CUDA packages (not nvidia-ml-py, which is the lab's) are left out because torch pins them
# itself. aiohttp is named because papermill asks for it on Python 3.12 only, where the pins must hold too, and
# soupsieve because its later versions refuse Python 3.11.2, the one of Debian 12.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
constraints:  ## pin the newest versions inside pyproject.toml's ranges: make constraints [TORCH=2.13.0]
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "constraints.txt is made with Python 3.11: make constraints PYTHON=python3.11"; exit 1; }
	@set -euo pipefail; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(PYTHON) -m venv "$$fresh"; \
	"$$fresh/bin/python" $(PIP_INSTALL) --quiet "torch==$(TORCH)" aiohttp 'soupsieve<3' -e '.[test]'; \
	"$$fresh/bin/python" -m pip check; \
	sed -n '/^#/!q;p' constraints.txt > "$$fresh/constraints.txt"; \
	"$$fresh/bin/python" -m pip freeze --all --exclude pip --exclude-editable \
		| sed -E 's/\+[A-Za-z0-9.]+$$//; /^nvidia-ml-py==/b; /^(nvidia-|cuda-|triton==)/d' >> "$$fresh/constraints.txt"; \
	cp "$$fresh/constraints.txt" constraints.txt; \
	echo "constraints.txt pins $$(grep -c == constraints.txt) packages; now run: make test"

# Made once, and brought up to date when a file on the right changes. pip's own report goes to .venv/install.log.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(CHECK_PYTHON)' 2>/dev/null || { \
		echo "SFT Lab needs Python 3.11, 3.12 or 3.13; found: $$($(or $(PYTHON),python3) -V 2>&1 | head -n 1)." \
			"Install one and name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@[ -x .venv/bin/pip ] || { echo "Making .venv with $$($(PYTHON) -V)"; $(PYTHON) -m venv --clear .venv; }
	@echo "Installing the lab: 2 GB on disk with torch for CPU, more with torch for CUDA; log: .venv/install.log"
	@set -o pipefail; \
	$(PINNED_BUILD) .venv/bin/python $(PIP_INSTALL) -e '.[test]' 2>&1 | tee .venv/install.log | { \
		found=0; while read -r first rest; do case "$$first $$rest" in \
			Collecting\ * | Processing\ *) found=$$((found + 1)); \
				if ((found % 25 == 0)); then echo "  $$found packages found"; fi;; \
			Downloading\ *MB\) | Downloading\ *GB\)) echo "  $$first $${rest##*/}";; \
			Building\ wheels\ *) echo "  building $${rest##*: }";; \
			Installing\ collected*) echo "  unpacking (the longest step)";; \
		esac; done; } \
	|| { echo; grep -E '^ *(ERROR|error):?' .venv/install.log | head -n 5; \
		echo "The install failed: see .venv/install.log. What arrived is kept; run make again to go on."; exit 1; }
	@touch $@ && echo "Installed in .venv."
