#!/usr/bin/env bash
# What needs a GPU, in three parts of under nine minutes each:
#   tests     builds the extensions for this GPU and runs every test marked gpu, each file in a process of its own
#   kernels   losses, heads and the input, beside their peers
#   training  whole trainings, their updates and loaders alone, the default fine-tuning, and the usual loops
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
  local how=(--maxfail=40 --durations=5) files file name
  [ "$mode" = gpu ] || how=(--collect-only --quiet)
  # Test files without a GPU test are left out: they may import packages that this machine lacks. A process for each: an
  # assertion on the device spoils all that comes after it in the same process.
  mapfile -t files < <(grep -lE '^(pytestmark = |@| .*marks=)pytest\.mark\.gpu' tests --include='test_*.py' -r | sort)
  for file in "${files[@]}"; do
    name=${file#tests/} name=${name%.py}
    step "$name" 120 "$python" -W ignore::pytest.PytestConfigWarning -m pytest -m gpu "${how[@]}" --junitxml="$out/tests-${name//\//-}.xml" "$file"
  done
}

kernels() {
  local device=(--device cuda) focal=() norm=() heads=() input=(--device cuda --batch 256 --threads 8) dtype
  [ "$mode" = gpu ] || device=(--device cpu --rounds 2) focal=(--shapes 64x2 16x1000) heads=(--shapes 16x16x1000)
  [ "$mode" = gpu ] || norm=(--shapes 2x16x8x8)
  [ "$mode" = gpu ] || input=(--sizes 32 --batch 64)
  for dtype in bfloat16 float32 float16; do
    step "focal loss, $dtype" 90 "$python" benchmarks/bench_focal.py "${device[@]}" --dtype "$dtype" "${focal[@]}"
  done
  step heads 90 "$python" benchmarks/bench_linear_focal.py "${device[@]}" --dtype bfloat16 "${heads[@]}"
  step normalisation 90 "$python" benchmarks/bench_norm.py "${device[@]}" --dtype bfloat16 "${norm[@]}"
  step input 90 "$python" benchmarks/bench_input.py --quick --data drawn "${input[@]}"
}

training() {
  local how=(--device cuda --rounds 3 --data drawn) small=(--network mobilefacenet --batch 64) start=(--rounds 2 --to-end) photos=drawn setting
  local settings=("mobilefacenet --batch 64" iresnet50) more=(resnet50 mobilefacenet iresnet100 timm/vit_small_patch16_224)
  # Rows come at the end of a step: two with few contenders rather than one with all.
  local memory=("facefast, in memory" "in memory, eager" "in memory, compiled" "in memory, eager and captured" "in memory, compiled and captured")
  local loaders=(facefast "torchvision, compiled" "DALI stock, compiled" "DALI stock, compiled and captured" "FFCV, compiled")
  [ -d ../shared/data/celeba-mini ] && photos=../shared/data/celeba-mini
  if [ "$mode" != gpu ]; then
    how=(--device cpu --rounds 1 --data drawn --size 32) small=(--network mobilefacenet --batch 4) start=(--rounds 1) photos=drawn
    settings=("mobilefacenet --batch 4") more=() memory=("in memory, eager" "in memory, eager and captured") loaders=(facefast "DALI stock, eager")
  fi
  # A setting is a network and its options.
  # shellcheck disable=SC2086
  for setting in "${settings[@]}"; do
    step "throughput, $setting" 120 "$python" benchmarks/throughput.py "${how[@]}" --networks $setting
  done
  step start 110 "$python" benchmarks/bench_start.py --data "$photos" "${start[@]}"
  step "peers in memory" 120 "$python" benchmarks/peers.py "${how[@]}" "${small[@]}" --contenders "${memory[@]}"
  step peers 120 "$python" benchmarks/peers.py "${how[@]}" "${small[@]}" --contenders "${loaders[@]}"
  # shellcheck disable=SC2086
  for setting in "${more[@]}"; do  # where time is left
    step "throughput, $setting" 120 "$python" benchmarks/throughput.py "${how[@]}" --networks $setting
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
