# The commands of README.md. Everything lives in .venv and models/, which `make clean` removes.
PYTHON ?= python3
BIN := .venv/bin
MODEL := models/smollm2-135m-instruct

.PHONY: setup demo test test-slow lint clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -qq --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[demo,dev]' -c constraints.txt
	touch $@

$(MODEL): | .venv/ready
	$(BIN)/python tools/get_demo_model.py --output $(MODEL)

demo: setup $(MODEL)
	$(BIN)/prefkit train examples/demo_dpo.yaml
	$(BIN)/python tools/demo_report.py saves/demo_dpo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/generate.py --check

test: lint $(MODEL)
	$(BIN)/python -m pytest -m "not slow"

test-slow: setup $(MODEL)
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv models saves
