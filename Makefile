# make demo   the main job on a small trained model: dense, SVG and AdaSpa; writes output/demo/
# make test   the tests
# make clean  removes what both made
# The demo's options go into DEMO, as in: make demo DEMO="--clips 1 --host embedded"

PYTHON ?= python3
OLD = "this needs Python 3.10 or later, and $(PYTHON) is %d.%d; name a newer one, as in: make PYTHON=python3.12 $(MAKECMDGOALS)"
INSTALLED := .venv/installed

.PHONY: demo test clean

demo: $(INSTALLED)
	.venv/bin/python demo/run.py $(DEMO)

test: $(INSTALLED)
	.venv/bin/python tests/run.py

# Installs once, and again when the requirements change.
$(INSTALLED): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else $(OLD) % sys.version_info[:2])'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv output
