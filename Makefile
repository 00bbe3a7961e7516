# The commands of README.md. Everything lives in .venv and models/, which `make clean` removes.
PYTHON ?= python3
BIN := .venv/bin
MODEL := models/smollm2-135m-instruct

.PHONY: setup demo demo-ppo test test-slow test-gpu lint clean

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

# A reward model, ppo by it, the policy merged, and three questions to the merged model.
demo-ppo: setup $(MODEL)
	rm -rf saves/demo_ppo_merged
	$(BIN)/prefkit train examples/reward.yaml output_dir=saves/demo_reward overwrite_output_dir=true
	$(BIN)/prefkit train examples/ppo.yaml reward_model=saves/demo_reward output_dir=saves/demo_ppo overwrite_output_dir=true
	$(BIN)/prefkit export saves/demo_ppo export_dir=saves/demo_ppo_merged
	printf '%s\n/reset\n' 'What is a bridge for?' 'Can a fish breathe air?' 'Describe a rainbow.' \
		| $(BIN)/prefkit chat saves/demo_ppo_merged temperature=0 max_new_tokens=100
	$(BIN)/python tools/demo_report.py saves/demo_ppo

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/generate.py --check

test: lint $(MODEL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: setup $(MODEL)
	$(BIN)/python -m pytest -m slow

# On a machine with two GPUs or more, and torch for them in .venv.
test-gpu: setup $(MODEL)
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

clean:
	rm -rf .venv models saves
