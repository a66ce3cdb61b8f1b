#!/usr/bin/env bash
# Everything that needs a GPU, within ten minutes: builds the extensions for this GPU, runs every test marked gpu, then
# the benchmarks. Prints tables; JSON lines go to $OUT, or to benchmarks/results. No network is needed; packages that are
# not installed, DALI for one, may come by PYTHONPATH.
#
#   bash benchmarks/on_gpu.sh            PYTHON=python3.12 chooses the interpreter
#   bash benchmarks/on_gpu.sh --dry-run  the same steps without a GPU: gpu tests are collected, benchmarks run on the CPU
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
dry=$([ "${1:-}" = --dry-run ] && echo 1 || echo 0)
deadline=$((SECONDS + 585))
failed=()

step() {  # step NAME SECONDS COMMAND...: at most so long, and never past the deadline; a failure does not stop the rest
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS
  shift 2
  echo "== $name"
  if [ "$left" -lt 5 ]; then failed+=("$name (no time left)"); return; fi
  timeout $((limit < left ? limit : left)) "$@" || failed+=("$name")
  echo "== $name: $((SECONDS - start)) s"
}

if [ "$dry" = 1 ]; then
  export OUT=${OUT:-$(mktemp -d)}
  device=(--device cpu --rounds 2)
  focal=(--shapes 64x2 16x1000) norm=(--shapes 2x16x8x8) heads=(--shapes 16x16x1000) input=(--sizes 112)
  tests=(--collect-only --quiet)
  step build 300 env FACEFAST_CUDA="${FACEFAST_CUDA:-auto}" "$python" setup.py -q build_ext --inplace
else
  device=(--device cuda) focal=() norm=() heads=() input=(--device cuda)
  tests=(--maxfail=20 --durations=5)
  export FACEFAST_REQUIRE_GPU=1 FACEFAST_REQUIRE_NATIVE=1
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 1
  step build 240 env FACEFAST_CUDA=1 FACEFAST_CUDA_ARCHS="$arch" "$python" setup.py -q build_ext --inplace
fi

# Test files without a GPU test are left out: they may import packages that this machine lacks.
mapfile -t files < <(grep -l 'mark\.gpu' tests --include='test_*.py' -r)
step tests 240 "$python" -W ignore::pytest.PytestConfigWarning -m pytest -m gpu "${tests[@]}" "${files[@]}"
for dtype in float32 bfloat16; do
  step "focal loss, $dtype" 120 "$python" benchmarks/bench_focal.py "${device[@]}" --dtype "$dtype" "${focal[@]}"
done
step "normalisation" 120 "$python" benchmarks/bench_norm.py "${device[@]}" --dtype bfloat16 "${norm[@]}"
step "input" 90 "$python" benchmarks/bench_input.py --quick --data drawn "${input[@]}"
step "heads" 90 "$python" benchmarks/bench_linear_focal.py "${device[@]}" --dtype bfloat16 "${heads[@]}"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all steps done in $SECONDS s"
