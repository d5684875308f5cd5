#!/usr/bin/env bash
# All that needs a GPU, in one call of under ten minutes: the gpu tests, the kernel benchmark, DeiT-B's bench with power.
# JSON results go to $OUT (default: benchmarks/results/gpu). Weights are random and images generated: nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
PYTHON=${PYTHON:-python3}
if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: no usable CUDA device here (see: lpvit doctor)" >&2
  exit 3
fi
mkdir -p "$OUT"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

step() { # NAME SECONDS COMMAND...: every step runs, whatever became of the others
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" || failed+=("$name")
}
lpvit() { "$PYTHON" -m lpvit_cli "$@"; }
export -f lpvit
export PYTHON

random_deit=(deit_base_50 --output "$work/run" --set model.pretrained=false --set data.dataset=synthetic --set finetune=null)
step "doctor" 60 bash -c 'lpvit doctor --json > "$0/doctor.json"' "$OUT"
step "gpu tests" 120 "$PYTHON" -m pytest -m gpu --junitxml "$OUT/tests.xml"
step "kernel benchmark" 90 bash -c '"$PYTHON" scripts/bench_linear.py --device cuda --dtype bfloat16 --tokens 50432 --output "$0/linear_gpu.json"' "$OUT"
step "calibrate" 90 bash -c 'lpvit calibrate "$@"' _ "${random_deit[@]}"
step "prune" 60 bash -c 'lpvit prune "$@"' _ "${random_deit[@]}"
step "bench" 330 bash -c 'out=$1; shift; lpvit bench "$@" --set bench.energy.window_seconds=5 --json > "$out/deit_base_50.json"' _ "$OUT" "${random_deit[@]}"

if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
