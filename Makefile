# make train | make test | make ui: each sets up .venv first if needed.
PYTHON  ?= python3
VARIANT ?= softfilm
ICBHI   ?=
ARGS    ?=
PORT    ?=

PY    := .venv/bin/python
READY := .venv/.ready

SCRIPT_ast      := ast_train.py
SCRIPT_grf      := ast_meta_fus_train.py
SCRIPT_film     := ast_film_train.py
SCRIPT_tafilm   := ast_tafilm_train.py
SCRIPT_softfilm := ast_film_soft.py
CONFIG_ast      := configs/ast_config.yaml
CONFIG_grf      := configs/ast_fus_config.yaml
CONFIG_film     := configs/ast_film_config.yaml
CONFIG_tafilm   := configs/ast_tafilm_config.yaml
CONFIG_softfilm := configs/ast_film_soft_config.yaml
SCRIPT := $(SCRIPT_$(VARIANT))
CONFIG := $(CONFIG_$(VARIANT))
CHECKPOINT := checkpoints/$(VARIANT)_best.pt
UI_PORT    := $(or $(PORT),5000)
DEMO_PORT  := $(or $(PORT),7860)

# Checked here and not in the rule, which would install everything first.
ifneq ($(filter train demo,$(MAKECMDGOALS)),)
ifeq ($(SCRIPT),)
$(error VARIANT=$(VARIANT) is none of ast, grf, film, tafilm, softfilm)
endif
endif

.PHONY: help train demo test lint ui clean

help:
	@echo "make train                              small SoftFiLM on a synthetic corpus (minutes)"
	@echo "make train VARIANT=ast                  the same for ast, grf, film, tafilm or softfilm"
	@echo "make train ICBHI=/path VARIANT=film     the full paper configuration on real data"
	@echo "make demo                               page on http://127.0.0.1:$(DEMO_PORT) to try the model; trains the"
	@echo "                                        small one if there is none; PORT= and VARIANT= change it"
	@echo "make test                               lint and the whole test suite"
	@echo "make ui                                 MLflow UI on http://127.0.0.1:$(UI_PORT); PORT= changes it"
	@echo "ARGS='training.epochs=5 training.warmup_epochs=1' adds configuration overrides to make train"

$(READY): requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade "pip>=25.1"
	$(PY) -m pip install --quiet -r requirements.txt -c constraints.txt
	$(PY) -m pip install --quiet --group dev -c constraints.txt
	touch $@

train: $(READY)
ifeq ($(ICBHI),)
	$(PY) -m data.synthetic --output demo_data --patients 48 --seed 0 --planted-effect
	$(PY) $(SCRIPT) --config $(CONFIG) configs/demo.yaml --mlflow-config configs/mlflow.yaml $(ARGS)
else
	$(PY) $(SCRIPT) --config $(CONFIG) --mlflow-config configs/mlflow.yaml \
	    dataset.data_folder="$(ICBHI)" $(ARGS)
endif

demo: $(READY)
	test -f $(CHECKPOINT) || $(MAKE) train
	$(PY) -m utils.demo --checkpoint $(CHECKPOINT) --port $(DEMO_PORT) --open

test: lint
	$(PY) -m pytest --numprocesses auto --dist loadfile

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

ui: $(READY)
	MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true $(PY) -m mlflow ui \
	    --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(UI_PORT)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
