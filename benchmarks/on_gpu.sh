#!/usr/bin/env bash
# What needs a GPU, in three parts of under nine minutes each:
#   tests     builds the extensions for this GPU and runs every test marked gpu
#   kernels   losses, heads and the input, beside their peers
#   training  whole trainings, their updates and loaders alone, and the usual loops
# Prints tables. JSON goes to $OUT, or to benchmarks/results: rows, and steps-PART.jsonl with each step's exit code and
# seconds. A step that fails or takes too long does not stop the rest. No network is needed; packages that are not
# installed, DALI or Liger for two, may come by PYTHONPATH.
#
#   bash benchmarks/on_gpu.sh [PART]            PYTHON=python3.12 chooses the interpreter; without PART all three
#   bash benchmarks/on_gpu.sh [PART] --dry-run  the same steps without a GPU: gpu tests are collected, the rest is small
#   bash benchmarks/on_gpu.sh [PART] --list     the steps' commands, without running them
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
parts=() mode=gpu list=0
for word in "$@"; do
  case $word in
    tests | kernels | training) parts+=("$word") ;;
    --dry-run) mode=dry ;;
    --list) list=1 ;;
    *) echo "there is no $word: give tests, kernels or training, and --dry-run or --list" >&2; exit 64 ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(tests kernels training)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
failed=()

step() {  # step NAME SECONDS COMMAND...: at most so long, and never past the part's end
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS code=0
  shift 2
  if [ "$list" = 1 ]; then echo "$part: $*"; return; fi
  echo "== $name"
  if [ "$left" -lt 5 ]; then code=124; else timeout -k 10 $((limit < left ? limit : left)) "$@" || code=$?; fi
  [ "$code" = 0 ] || failed+=("$part, $name (exit code $code)")
  printf '{"part": "%s", "step": "%s", "exit_code": %d, "seconds": %d}\n' "$part" "$name" "$code" $((SECONDS - start)) >> "$steps"
  echo "== $name: $((SECONDS - start)) s"
}

build() {
  if [ "$mode" = gpu ]; then
    local arch=THIS
    [ "$list" = 1 ] || arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || arch=
    step build 300 env FACEFAST_CUDA=1 FACEFAST_CUDA_ARCHS="$arch" "$python" setup.py -q build_ext --inplace
  else
    step build 300 env FACEFAST_CUDA="${FACEFAST_CUDA:-auto}" "$python" setup.py -q build_ext --inplace
  fi
}

tests() {
  local how=(--maxfail=40 --durations=5) files
  [ "$mode" = gpu ] || how=(--collect-only --quiet)
  # Test files without a GPU test are left out: they may import packages that this machine lacks.
  mapfile -t files < <(grep -l 'mark\.gpu' tests --include='test_*.py' -r)
  step tests 420 "$python" -W ignore::pytest.PytestConfigWarning -m pytest -m gpu "${how[@]}" --junitxml="$out/tests.xml" "${files[@]}"
}

kernels() {
  local device=(--device cuda) focal=() norm=() heads=() input=(--device cuda --batch 256 --threads 8) types=(float32 bfloat16) dtype
  [ "$mode" = gpu ] || device=(--device cpu --rounds 2) focal=(--shapes 64x2 16x1000) heads=(--shapes 16x16x1000)
  [ "$mode" = gpu ] || norm=(--shapes 2x16x8x8)
  [ "$mode" = gpu ] || input=(--sizes 32 --batch 64)
  for dtype in "${types[@]}"; do
    step "focal loss, $dtype" 120 "$python" benchmarks/bench_focal.py "${device[@]}" --dtype "$dtype" "${focal[@]}"
  done
  step normalisation 90 "$python" benchmarks/bench_norm.py "${device[@]}" --dtype bfloat16 "${norm[@]}"
  step heads 90 "$python" benchmarks/bench_linear_focal.py "${device[@]}" --dtype bfloat16 "${heads[@]}"
  step input 120 "$python" benchmarks/bench_input.py --quick --data drawn "${input[@]}"
}

training() {
  local how=(--device cuda --rounds 3 --data drawn) peers=() network networks=(iresnet50 mobilefacenet resnet50)
  if [ "$mode" != gpu ]; then
    how=(--device cpu --rounds 1 --data drawn --size 32 --batch 4) networks=(mobilefacenet)
    peers=(--contenders facefast "DALI stock, eager")
  fi
  for network in "${networks[@]}"; do
    step "throughput, $network" 150 "$python" benchmarks/throughput.py "${how[@]}" --networks "$network"
  done
  step peers 200 "$python" benchmarks/peers.py "${how[@]}" --network mobilefacenet "${peers[@]}"
  for network in iresnet100 timm/vit_small_patch16_224; do  # where time is left
    [ "$mode" = gpu ] && step "throughput, $network" 150 "$python" benchmarks/throughput.py "${how[@]}" --networks "$network"
  done
}

if [ "$mode" = gpu ]; then
  export FACEFAST_REQUIRE_GPU=1 FACEFAST_REQUIRE_NATIVE=1
elif [ "$mode" = dry ]; then
  export OUT=${OUT:-$(mktemp -d)}
fi
out=${OUT:-benchmarks/results}
for part in "${parts[@]}"; do
  steps=$out/steps-$part.jsonl deadline=$((SECONDS + 530))
  [ "$list" = 1 ] || { mkdir -p "$out" && : > "$steps"; }
  build
  "$part"
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
[ "$list" = 1 ] || echo "all steps done in $SECONDS s; JSON in $out"
