# What CI runs, and what a developer runs: `just` alone lists it.
python := env("PYTHON", "python")

default:
    @just --list

# format and style
lint:
    {{python}} -m ruff format --check .
    {{python}} -m ruff check .

# mypy follows no import hook, so it checks the wheel, unpacked: exactly what ships
types:
    rm -rf build && mkdir -p build/dist build/check
    {{python}} -m pip wheel -q --no-deps --no-build-isolation -w build/dist .
    {{python}} -m zipfile -e build/dist/*.whl build/check
    rm -rf build/lib build/bdist.*
    {{python}} -m mypy build/check/vlmedge

# a process for each core; a file's tests stay together, because they share what they made
side_by_side := "-n auto --maxprocesses 4 --dist loadfile"

# every test, slow ones too
test *options:
    {{python}} -m pytest {{side_by_side}} {{options}}

# the tests that take seconds
quick *options:
    {{python}} -m pytest {{side_by_side}} -m "not slow" {{options}}

# speed: run on a quiet machine
bench:
    {{python}} benchmarks/startup.py
    {{python}} benchmarks/export_size.py --work /tmp/vlmedge-size
    {{python}} benchmarks/runtime_overhead.py
    {{python}} benchmarks/onnx_speed.py

fix:
    {{python}} -m ruff format .
    {{python}} -m ruff check --fix .

check: lint types test
