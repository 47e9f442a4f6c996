.PHONY: build test fuzz bench bench-gpu lint

build:
	python setup.py build_ext --inplace

test:
	python -m pytest

# DRAWS=100000 draws more, FUZZ="-k emulated" chooses, FASTCLS_ISA=scalar has other kernels.
DRAWS = 20000
fuzz:
	OMP_NUM_THREADS=1 FASTCLS_FUZZ_DRAWS=$(DRAWS) python -m pytest tests/fuzz --hypothesis-show-statistics $(FUZZ)

bench:
	python -m pytest bench/ --benchmark --json auto

bench-gpu:
	bash bench/gpu.sh

lint:
	ruff check .
	ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs clang-format --dry-run -Werror
