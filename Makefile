# make demo      set up and run the quickstart: a real model, a real mixture, one merged model
# make test      set up and run the tests (make test-slow: $(VENV)/dev.done $(VENV)/demo.done
	$(BIN)/python -m pytest -m slow

test-all: test test-slow

bench: $(VENV)/demo.done
	$(BIN)/python benchmarks/quickstart_checks.py $(RUN) --output benchmarks/results/quickstart.md

quality: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
