#!/usr/bin/env bash
# The GPU half of tests and benchmarks in one command: bash bench/gpu.sh [pytest options of bench/]
#
# Builds in place, runs the CUDA tests, small cases under compute-sanitizer, and the benchmarks at
# batch 512 and 4096, whose rows go to bench/results/<GPU>.json. Without a GPU it says so and shows
# that the benchmarks are collected.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "torch finds no GPU: nothing is measured"
  exec pytest -q bench --device cuda "$@"  # not python -m: nothing is built in this folder
fi

FASTCLS_CUDA=1 python setup.py build_ext --inplace
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python -m fastcls info --kernels
python -m pytest -q tests/ops -k "cuda and not emulated"

small="cuda and not emulated and integers and float32-contiguous and (deep3 or cifar1 or rect or overlap)"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    echo "=== compute-sanitizer --tool $tool"
    # PyTorch's caching allocator would hide reads past a tensor's end.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --kernel-name-exclude kernel_substring=at:: \
      python -m pytest -q tests/ops/test_conv_block.py -k "$small"
  done
else
  echo "compute-sanitizer is not on PATH: not run"
fi

python -m pytest -q bench --device cuda --benchmark --batch 512,4096 --json auto "$@"
