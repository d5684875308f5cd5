#!/usr/bin/env bash
# All that needs a GPU, in one call of under ten minutes: the gpu tests, the kernel benchmark, DeiT-B's bench with power.
# JSON results go to $OUT (default: benchmarks/results/gpu). Weights are random and images generated: nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results/gpu}
default=python3
if [ -x .venv/bin/python ]; then default=.venv/bin/python; fi
PYTHON=${PYTHON:-$default}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: no usable CUDA device here (see: lpvit doctor)" >&2
  exit 3
fi
mkdir -p "$OUT"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

DEADLINE=590 # seconds from the start: later steps get what is left
step() { # NAME SECONDS COMMAND...: every step runs, whatever became of the others
  local name=$1 seconds=$2 left=$((DEADLINE - SECONDS)) begun=$SECONDS
  shift 2
  if [ "$left" -lt "$seconds" ]; then seconds=$((left > 1 ? left : 1)); fi
  echo "== $name (at most $seconds s)"
  timeout --kill-after=5 "$seconds" "$@" || failed+=("$name")
  echo "== $name took $((SECONDS - begun)) s"
}
lpvit() { "$PYTHON" -m lpvit_cli "$@"; }
export -f lpvit
export PYTHON

# Random weights, pruned by magnitude from few images: quick, and good enough where only time and power are measured.
random_deit=(deit_base_50 --output "$work/run" --set model.pretrained=false --set data.dataset=synthetic --set finetune=null
  --set calibrate.images=128 --set prune.method=magnitude)
step "doctor" 60 bash -c 'lpvit doctor --json > "$0/doctor.json"' "$OUT"
step "gpu tests" 120 "$PYTHON" -m pytest -m gpu --junitxml "$OUT/tests.xml"
step "kernel benchmark" 260 "$PYTHON" scripts/bench_kernels.py --minutes 3.3 --output "$OUT/kernels_gpu.json"
step "calibrate" 60 bash -c 'lpvit calibrate "$@"' _ "${random_deit[@]}"
step "prune" 60 bash -c 'lpvit prune "$@"' _ "${random_deit[@]}"
step "bench" 240 bash -c 'out=$1; shift; lpvit bench "$@" --batch-size 256 --layers --set bench.energy.window_seconds=3 --json > "$out/deit_base_50.json"' _ "$OUT" "${random_deit[@]}"

if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
