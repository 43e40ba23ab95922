# netpol-agent: `make` prints what there is. Everything runs from a clean clone on Debian with Python 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
PACKAGES := iptables ipset iproute2 conntrack nftables
SCENARIO ?= all
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help packages venv prometheus helm manifests demo test image image-lock e2e unit lint bench clean

help:
	@echo 'make demo [SCENARIO=a|b|c]   play the scenarios: real packets through real rules, beside what the policies say'
	@echo 'make test                    every test; those that need root run where root is had'
	@echo 'make image [UNLOCKED=1]      leaves dist/netpol-agent-image.tar, the container image, without a registry or a daemon'
	@echo 'make image-lock              write what the image is made of from now on into deploy/image/*.lock'
	@echo 'make e2e KUBECONFIG=FILE     install the chart in a real cluster, and try everything there (tests/cluster/kube.py)'
	@echo 'make unit                    the tests that need neither root nor a kernel feature'
	@echo 'make lint                    ruff, mypy --strict, layers'
	@echo 'make bench                   measure, and write docs/benchmarks.md'
	@echo 'make manifests               write deploy/*.yaml from the Helm chart'
	@echo 'make venv                    leaves $(BIN)/netpol-agent'
	@echo 'make clean                   remove what these have made'

# Debian's packages, only when a command of theirs is missing.
packages:
	@deploy/packages $(PACKAGES)

$(VENV)/.ready: pyproject.toml deploy/constraints.txt deploy/venv
	@PYTHON='$(PYTHON)' VENV='$(VENV)' deploy/venv

venv: $(VENV)/.ready

prometheus: venv
	@VENV='$(VENV)' deploy/prometheus

helm: venv
	@VENV='$(VENV)' deploy/helm

manifests: helm
	@VENV='$(VENV)' deploy/manifests

demo: packages venv
	@SCENARIO='$(SCENARIO)' NETPOL_AGENT='$(BIN)/netpol-agent' deploy/demo

test: packages venv prometheus helm
	@env -u KUBECONFIG $(BIN)/pytest -n $(JOBS) --dist loadgroup $(TESTS)

# Variables that are given to make are in its recipes' environment: ARCH, UNLOCKED, OUT, SOURCE_DATE_EPOCH.
image: venv
	@PYTHON='$(BIN)/python' deploy/image/build

image-lock: venv
	@$(BIN)/python deploy/image/lock.py $(ARCH)

e2e: packages venv prometheus helm image
	@[ -n "$$KUBECONFIG" ] || { echo 'make e2e: give KUBECONFIG=FILE of a cluster without a policy engine' >&2; exit 2; }
	@E2E=1 $(BIN)/pytest -vv --tb=short --durations=10 $(or $(TESTS),tests/e2e)

unit: venv prometheus helm
	@env -u KUBECONFIG $(BIN)/pytest -n $(JOBS) -m 'not root' $(TESTS)

lint: venv
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports >/dev/null && echo 'lint: clean'

bench: packages venv
	@$(BIN)/python -m tests.bench $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY),--out docs/benchmarks.md)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
