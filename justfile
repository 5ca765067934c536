# Shortcuts for contributors; `just` alone lists them. https://just.systems

venv := ".venv/bin/"

# List the recipes.
default:
    @just --list

# Make the environment with everything that tests and checks need.
setup:
    python3 -m venv .venv
    {{venv}}pip install -e '.[test]'

# The static checks of .ci/run.
check:
    {{venv}}ruff check .
    {{venv}}ruff format --check .
    {{venv}}mypy
    {{venv}}lint-imports
    {{venv}}codespell

# Format the code and fix what can be fixed.
fix:
    {{venv}}ruff check --fix .
    {{venv}}ruff format .

# The tests that need no Ray, a few minutes; arguments go to pytest.
quick *arguments:
    {{venv}}pytest -m "not ray" -n 2 {{arguments}}

# All tests; arguments go to pytest.
test *arguments:
    {{venv}}pytest -n 2 {{arguments}}

# How dense the package is, beside other projects.
count *arguments:
    {{venv}}python scripts/count.py {{arguments}}

# All that must hold for every commit, in a fresh environment.
ci:
    .ci/run
