#!/usr/bin/env bash
# The GPU half of tests and benchmarks in one command: bash bench/gpu.sh [pytest options of bench/]
#
# Builds in place, runs benchmarks at batch 512 and 4096, whole trainings, the CUDA tests, and small
# cases of them under compute-sanitizer. Rows go to bench/results/<GPU>.json. Without a GPU it says
# so and shows that the benchmarks are collected.
#
# SHORT=1: for some minutes. Nothing is built where the package has its CUDA kernels;
# batch 512, the peers that win, rows that are not there yet, no sanitizer, and each part begins
# nothing after its seconds.
# PARTS="bench train tests": these parts. FASTCLS_DATA: the folder that holds MNIST. JSON: a file
# for the rows instead.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "torch finds no GPU: nothing is measured"
  exec pytest -q bench --device cuda "$@"  # not python -m: nothing is built in this folder
fi

SHORT=${SHORT:-} JSON=${JSON:-auto} PARTS=${PARTS:-}
if [[ -z $PARTS ]]; then
  PARTS="bench train tests"
  [[ $SHORT ]] || PARTS+=" sanitizer"
fi
if [[ -z $SHORT ]] || ! compgen -G 'fastcls/_cuda*.so' > /dev/null; then
  FASTCLS_CUDA=1 python setup.py build_ext --inplace
fi
export PYTHONPATH=$PWD:$PWD/tests:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}
processes=$(($(nproc) > 4 ? $(nproc) - 2 : 2))
one_core=(env OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1)  # for processes that share them

# Runs the command; with SHORT for so many seconds, after which pytest skips the rest.
limited() {
  local seconds=$1 limit=()
  shift
  [[ $SHORT ]] && limit=(timeout --kill-after=5 $((seconds + 25)) env FASTCLS_SECONDS="$seconds")
  echo "=== $*"
  "${limit[@]}" "$@" || { status=$? && echo "ended with $status"; }
}

status=0
for part in $PARTS; do
  SECONDS=0
  case $part in
    bench)
      options=(--device cuda --benchmark --json "$JSON")
      if [[ $SHORT ]]; then
        options+=(-n "$processes" --dist worksteal --seconds 0.1 --few-compiled --missing)
        options+=(--peers eager-cl,eager-graph-cl,compile-graph-cl,liger,quack-graph)
        options+=(--dtypes bfloat16,tf32,float32 -k 'not (conv_block and infer and float32)')
      else
        options+=(--batch 512,4096 --seconds 1)
      fi
      limited 78 "${one_core[@]}" python -m pytest -p time_limit -q \
        bench/bench_conv_block.py bench/bench_cross_entropy.py bench/bench_train.py \
        "${options[@]}" "$@"
      ;;
    train)
      limited 60 python bench/gpu_train.py --json "$JSON"
      ;;
    tests)
      limited 65 "${one_core[@]}" python -m pytest -p time_limit -q \
        tests/ops tests/test_modules.py tests/test_fuse.py tests/test_train.py \
        -k "cuda and not emulated" -n "$processes" --dist worksteal --tb=short -p no:cacheprovider
      ;;
    sanitizer)
      conv="integers and (float32-contiguous or bfloat16-channels_last) and (deep3 or cifar1 or rect or overlap)"
      loss="float32 and (test_hits or test_matrix_views or test_layouts)"
      if ! command -v compute-sanitizer > /dev/null; then
        echo "compute-sanitizer is not on PATH: not run"
        continue
      fi
      for tool in memcheck racecheck initcheck synccheck; do
        # PyTorch's caching allocator would hide reads past a tensor's end.
        limited 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
          --error-exitcode 1 --kernel-name-exclude kernel_substring=at:: \
          python -m pytest -q tests/ops -k "cuda and not emulated and (($conv) or ($loss))"
      done
      ;;
  esac
  echo "=== $part took $SECONDS s"
done
exit $status
