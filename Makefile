# make demo    convert two small models, serve them with the real SGLang, compare (no GPU needed)
# make test    all tests, with SGLang 0.5.16
# Both set up what they need. SGLANG=0.5.23 takes the other tested version.

SGLANG ?= 0.5.16
VENV := .venv-$(SGLANG)
# Without byte code every start of SGLang compiles it anew.
unexport PYTHONDONTWRITEBYTECODE
unexport PYTHONPATH

.PHONY: help demo test test-sglang lint env wheels clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: env
	$(VENV)/bin/sglang-w4afp8 demo $(ARGS)

test: env wheels
	scripts/test.sh $(SGLANG) $(ARGS)

# Only what depends on the SGLang version: for the second one.
test-sglang: env wheels
	scripts/test.sh $(SGLANG) tests/contract/test_registration.py tests/integration \
		tests/patches/test_series.py $(ARGS)

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy sglang_w4afp8

env:
	@scripts/env.sh $(SGLANG)

wheels:
	@scripts/wheels.sh

clean:
	rm -rf .venv-* .whl .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
