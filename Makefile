# make demo   the main job on a small trained model: dense, SVG, AdaSpa and Auto; writes output/demo/
# make test   the tests
# make nightly  the tests of made-up runs and of random kernel calls, on 10,000 runs and 20,600 calls that no night before has tried, and every
#   kernel compiled for every GPU
# make schemas  after a change of a node: what saved workflows rely on of it (tests/snapshots), and its English words (locales/en)
# make clean  removes what demo and test made
# The demo's options go into DEMO, as in: make demo DEMO="--clips 1 --host embedded"

PYTHON ?= python3
OLD = "this needs Python 3.10 or later, and $(PYTHON) is %d.%d; name a newer one, as in: make PYTHON=python3.12 $(MAKECMDGOALS)"
INSTALLED := .venv/installed

.PHONY: demo test nightly schemas clean

demo: $(INSTALLED)
	.venv/bin/python demo/run.py $(DEMO)

test: $(INSTALLED)
	.venv/bin/python tests/run.py

nightly: $(INSTALLED)
	SVA_NIGHTLY=1 .venv/bin/python -m pytest --numprocesses=auto tests/attention/test_properties.py tests/kernels/test_fuzz.py
	SVA_NIGHTLY=1 TRITON_INTERPRET=1 .venv/bin/python -m pytest --numprocesses=auto tests/triton_kernels/test_interpreter_fuzz.py
	SVA_NIGHTLY=1 .venv/bin/python -m pytest --numprocesses=auto tests/triton_kernels/test_compile.py

schemas: $(INSTALLED)
	.venv/bin/python tools/node_snapshot.py
	.venv/bin/python tools/locales.py

# Installs once, and again when the requirements change.
$(INSTALLED): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else $(OLD) % sys.version_info[:2])'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv output
