.PHONY: build test bench bench-gpu lint

build:
	python setup.py build_ext --inplace

test:
	python -m pytest

bench:
	python -m pytest bench/ --benchmark --json auto

bench-gpu:
	bash bench/gpu.sh

lint:
	ruff check .
	ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs clang-format --dry-run -Werror
