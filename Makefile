# make demo   the main job on a small trained model: dense, SVG and AdaSpa; writes output/demo/
# make test   the tests
# make clean  removes what both made
# The demo's options go into DEMO, as in: make demo DEMO="--clips 1 --host embedded"

PYTHON ?= python3
INSTALLED := .venv/installed

.PHONY: demo test clean

demo: $(INSTALLED)
	.venv/bin/python demo/run.py $(DEMO)

test: $(INSTALLED)
	.venv/bin/python tests/run.py

# Installs once, and again when the requirements change.
$(INSTALLED): requirements-dev.txt
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv output
