# make help lists the targets; each does all the set-up it needs.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# in a container one is root, as whom Jupyter starts only if told so
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help demo notebooks outputs test quality style assets clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

.venv/.app: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.dev: .venv/.app requirements-notebooks.txt requirements-benchmarks.txt requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/.app  ## set up and start the app on http://127.0.0.1:7860
	$(BIN)/python app.py

.venv/.notebooks: .venv/.app requirements-notebooks.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-notebooks.txt
	touch $@

notebooks: .venv/.notebooks  ## set up and open the lessons in JupyterLab, on this machine only
	cd notebooks && ../$(BIN)/jupyter lab --ip=127.0.0.1 $(AS_ROOT) --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate

outputs: .venv/.notebooks  ## write the notebooks anew from the .py beside them and run them (about 10 minutes)
	cd notebooks && for f in 0*.py; do ../$(BIN)/jupytext --quiet --to ipynb $$f || exit 1; done
	cd notebooks && ../$(BIN)/jupyter nbconvert --log-level=WARN --to notebook --execute --inplace 0*.ipynb

test: .venv/.dev browser  ## set up and run the whole test suite (about 15 minutes on 2 cores)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"
	$(BIN)/python -m pytest -m slow

# the system's browser, for the tests of the page
.PHONY: browser
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
		|| (apt-get update -qq && apt-get install -qq -y chromium >/dev/null) \
		|| (echo "The tests of the page need Chromium: install it, then run make test again." && exit 1)

quality: .venv/.dev  ## lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: .venv/.dev  ## format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

assets: .venv/.app  ## regenerate the adapters in assets/ (about half an hour on 2 cores)
	rm -rf assets/imaginary-authors-smollm2-135m
	$(BIN)/python -m alter_demo teach --which target --out assets/imaginary-authors-smollm2-135m/target
	$(BIN)/python -m alter_demo teach --which retain --out assets/imaginary-authors-smollm2-135m/retain

clean:  ## remove the environment
	rm -rf .venv
