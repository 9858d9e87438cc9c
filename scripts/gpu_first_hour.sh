#!/usr/bin/env bash
# What a machine with an NVIDIA GPU is asked first: builds with CMake alone, runs every test on the card, checks parity with the reference values and
# memory accesses, and measures training, starts and each operation against what the card can do. Needs nvcc, CMake 3.22 and a C++17 compiler; neither
# Node.js nor a network nor oneDNN nor OpenBLAS. One step that fails does not stop the others.
#
#   scripts/gpu_first_hour.sh [--quick] [--out DIR] [--json FILE]
#   scripts/gpu_first_hour.sh --simulate     the same script on the simulated device, with tiny shapes: no GPU, no figure means anything
#
# LORA_DA_REFERENCE names the reference folders (default: ../shared/reference beside the checkout). Prints one table at the end, which is also
# DIR/results.tsv; what each step printed is in DIR/logs. Exit status: 0, or 1 where anything failed. DIR is build-gpu unless named.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

simulate=false quick=false out='' json=''
while [ $# -gt 0 ]; do
  case $1 in
    --simulate) simulate=true ;;
    --quick) quick=true ;;
    --out | --json)
      if [ $# -lt 2 ]; then
        echo "gpu_first_hour.sh: expected a value for $1" >&2
        exit 2
      fi
      if [ "$1" = --out ]; then out=$2; else json=$2; fi
      shift
      ;;
    *)
      echo "gpu_first_hour.sh: unknown option $1 (there are --simulate, --quick, --out DIR, --json FILE)" >&2
      exit 2
      ;;
  esac
  shift
done
if [ -z "$out" ]; then
  out=$root/build-gpu
  if $simulate; then out=$root/build-gpu-simulated; fi
fi
mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
build=$out/build results=$out/results.tsv logs=$out/logs
: >"$results"

# Columns: what, value, unit, share, status, detail.
record() {
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "$5" "$(tr '\t\n' '  ' <<<"$6" | sed 's/ *$//')" >>"$results"
}

# step NAME SECONDS COMMAND...: the command with a time limit, its output in a file; a line of results where it fails, unless it exits with 77, which
# means skipped, or lines of its own say so.
step() {
  local name=$1 seconds=$2 log=$logs/${1// /_}.log status start=$SECONDS failedBefore
  shift 2
  failedBefore=$(grep -c $'\tfailed\t' "$results")
  printf '%-44s' "$name …" >&2
  timeout "$seconds" "$@" >"$log" 2>&1 </dev/null
  status=$?
  printf ' %4d s' $((SECONDS - start)) >&2
  case $status in
    0) echo >&2 ;;
    77)
      echo ', skipped' >&2
      record "$name" '' '' '' skipped "$(tail -n 1 "$log" | sed 's/^skipped: //')"
      ;;
    *)
      echo ", failed: see $log" >&2
      if [ "$(grep -c $'\tfailed\t' "$results")" = "$failedBefore" ]; then
        local why="exit status $status"
        if [ $status = 124 ]; then why="not done after $seconds s"; fi
        record "$name" '' '' '' failed "$why; $(last_words "$log")"
      fi
      ;;
  esac
  return $status
}

# Of doctest its summary, of other programs what they printed last.
last_words() {
  { grep 'test cases:' "$1" || grep -v '^ *$' "$1"; } | tail -n 1 | cut -c -160
}

# tests NAME SECONDS PREFIX ARGUMENTS...: doctest's summary as a line of results. PREFIX: a command that runs the tests, in one word, or empty.
tests() {
  local name=$1 seconds=$2 prefix=$3 log=$logs/${1// /_}.log summary
  shift 3
  # shellcheck disable=SC2086
  step "$name" "$seconds" $prefix "$build/native_tests" "$@"
  summary=$(sed -n 's/.*test cases: *[0-9]* *| *\([0-9]*\) passed *| *\([0-9]*\) failed.*/\1 \2/p' "$log" | tail -n 1)
  if [ -n "$summary" ] && ! grep -qF "$name"$'\t\t\t\tfailed' "$results"; then
    record "$name" "${summary% *}" passed '' ok ''
  fi
}

# --- the machine ------------------------------------------------------------------------------------------------

capability='' card='simulated device'
if ! $simulate; then
  card=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -n 1)
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
fi
find_tool() {
  local found
  for found in "${CUDA_HOME:-}/bin/$1" "$(command -v "$1")" "/usr/local/cuda/bin/$1"; do
    if [ -x "$found" ]; then
      echo "$found"
      return
    fi
  done
}
nvcc=$(find_tool nvcc)
commit=$(git -C "$root" log -1 --format=%h 2>/dev/null || echo unknown)
echo "$card; ${nvcc:-no nvcc}; lora-da $commit; results in $out" >&2

# --- build ------------------------------------------------------------------------------------------------------

configure=(cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DLORA_DA_CPU=OFF -DLORA_DA_TESTS=ON)
targets=(native_tests bench_gpu_throughput bench_gpu_roofline)
if $simulate; then
  configure+=(-DLORA_DA_CUDA=OFF -DLORA_DA_CUDA_SIM=ON)
  targets+=(lora_da_cuda_sim)
else
  configure+=(-DLORA_DA_CUDA=ON -DLORA_DA_CUDA_SIM=OFF "-DLORA_DA_CUDA_ARCHITECTURES=$capability")
  targets+=(all)
fi
start=$SECONDS built=false
if ! step 'configure' 600 "${configure[@]}"; then
  true
elif $simulate && grep -q 'without the simulator' "$logs/configure.log"; then
  record 'build' '' '' '' skipped "the simulator needs CUDA's headers: set CUDA_HOME, or run scripts/cuda-toolkit.sh"
elif step 'build' 3000 cmake --build "$build" --parallel "$(nproc)" --target "${targets[@]}"; then
  record 'build' $((SECONDS - start)) s '' ok ''
  built=true
fi

export LORA_DA_TEST_DEVICES=cuda
# The longest step and the start of llama-2-7b are those of the budget in docs/architecture.md.
sizes=(--size full) models=smollm2-135m,llama-3.2-1b,llama-2-7b shapes=4x256,8x512,8x1024 steps=10 begin=256x200
if $quick; then models=smollm2-135m,llama-3.2-1b shapes=4x256,8x512 steps=5 begin=64x128; fi
if $simulate; then
  export LORA_DA_CUDA_LIBRARY=$build/liblora_da_cuda_sim.so LORA_DA_TEST_SMALL=1
  sizes=(--size tiny) models=tiny shapes=2x32 steps=2 begin=4x16
fi

# --- tests ------------------------------------------------------------------------------------------------------

reference=${LORA_DA_REFERENCE:-$root/../shared/reference}
of_models='*model_test.cpp,*collection_test.cpp,*init_test.cpp,*steady_step_test.cpp'
of_operations="-sfe=*reference_test.cpp,$of_models"
run_tests() {
  tests 'operation tests' 1800 '' "$of_operations"
  tests 'model tests' 1800 '' "-sf=$of_models"
  if [ -f "$reference/llama-tied/config.json" ]; then
    LORA_DA_REFERENCE=$reference tests 'parity with the reference' 1800 '' '-sf=*reference_test.cpp'
    record_bfloat16_errors
  else
    record 'parity with the reference' '' '' '' skipped "no reference folders in $reference"
  fi
  record_spills
  sanitize memcheck
  for tool in racecheck synccheck; do sanitize $tool --kernel-name kns=lora_da; done
}

# The largest of the folders' errors, in errors of transformers.
record_bfloat16_errors() {
  local found
  found=$(sed -n "s/.*error of logits \([0-9.e-]*\), of gradients \([0-9.e-]*\) of transformers'.*/\1 \2/p" "$logs/parity_with_the_reference.log" |
    awk '{ if ($1 > logits) logits = $1; if ($2 > gradients) gradients = $2 } END { if (NR) print logits, gradients }')
  if [ -z "$found" ]; then return; fi
  record 'error of logits in bfloat16' "${found% *}" ratio '' ok "to transformers' in bfloat16; 1.5 is allowed"
  record 'error of gradients in bfloat16' "${found#* }" ratio '' ok "to transformers' in bfloat16; 1.5 is allowed"
}

# What ptxas says of the kernels.
record_spills() {
  local table
  table=$(find "$build" -path '*/cuda*/resources.txt' | sort | tail -n 1)
  if [ -z "$table" ]; then
    record 'kernels that spill registers' '' '' '' skipped 'not compiled by nvcc'
  else
    record 'kernels that spill registers' "$(awk 'NR > 1 && $4 > 0' "$table" | wc -l)" "of $(($(wc -l <"$table") - 1))" '' ok ''
  fi
}

# sanitize TOOL OPTIONS...: the tests of all operations at their small sizes. What lies outside of an array is looked for in the kernels of NVIDIA's
# libraries too, which get their addresses from us; races and barriers in our own only.
sanitize() {
  local sanitizer
  sanitizer=$(find_tool compute-sanitizer)
  if $simulate || [ -z "$sanitizer" ]; then
    record "compute-sanitizer $1" '' '' '' skipped "$($simulate && echo 'a simulated device' || echo 'compute-sanitizer was not found')"
    return
  fi
  LORA_DA_TEST_SMALL=1 tests "compute-sanitizer $1" 1800 "$sanitizer --error-exitcode 99 --tool $*" "$of_operations"
}

# --- speed ------------------------------------------------------------------------------------------------------

measure() {
  local model
  step 'operations' 1800 "$build/bench_gpu_roofline" "${sizes[@]}" --results "$results"
  for model in ${models//,/ }; do
    step "training and start of $model" 3600 "$build/bench_gpu_throughput" "${sizes[@]}" --models "$model" --shapes "$shapes" --steps "$steps" \
      --start "$begin" --results "$results"
  done
  if $simulate; then
    record 'PEFT' '' '' '' skipped 'a simulated device'
  elif ! command -v python3 >/dev/null; then
    record 'PEFT' '' '' '' skipped 'python3 was not found'
  else
    for model in ${models//,/ }; do
      step "PEFT on $model" 1200 python3 "$root/benchmarks/gpu/peft_step.py" --models "$model" --shapes "$shapes" --steps "$steps" --results "$results"
    done
    record_ratios
  fi
}

# Ours over PEFT's, where both have a figure.
record_ratios() {
  awk -F '\t' -v OFS='\t' '$3 == "tokens/s" { rate[$1] = $2 }
    END { for (what in rate) if ((what " with PEFT") in rate) print what ", PEFT = 1", sprintf("%.2f", rate[what] / rate[what " with PEFT"]), "ratio", "", "ok", "" }' \
    "$results" | sort >"$out/ratios.tsv"
  cat "$out/ratios.tsv" >>"$results"
}

# --- the table --------------------------------------------------------------------------------------------------

print_table() {
  awk -F '\t' '
    function line(what, value, unit, share, status, detail) { printf "%-56s %10s %-10s %7s %-8s %s\n", what, value, unit, share, status, detail }
    BEGIN { line("what", "value", "unit", "share", "status", "") }
    { line($1, $2, $3, $4 == "" ? "" : sprintf("%.1f %%", 100 * $4), $5, $6) }' "$results"
}

print_json() {
  awk -F '\t' -v card="$card" -v commit="$commit" -v simulated=$simulate '
    function text(value) { gsub(/\\/, "\\\\", value); gsub(/"/, "\\\"", value); gsub(/[\001-\037]/, " ", value); return "\"" value "\"" }
    function number(value) { return value == "" ? "null" : value }
    BEGIN { printf "{\"card\":%s,\"commit\":%s,\"simulated\":%s,\"results\":[", text(card), text(commit), simulated }
    { printf "%s\n{\"what\":%s,\"value\":%s,\"unit\":%s,\"share\":%s,\"status\":%s,\"detail\":%s}", (NR > 1 ? "," : ""),
        text($1), number($2), text($3), number($4), text($5), text($6) }
    END { print "\n]}" }' "$results"
}

if $built; then
  run_tests
  measure
fi
echo
print_table
if [ -n "$json" ]; then print_json >"$json"; fi
failed=$(grep -c $'\tfailed\t' "$results")
echo
echo "$card, lora-da $commit: $(grep -c $'\tok\t' "$results") ok, $(grep -c $'\tskipped\t' "$results") skipped, $failed failed"
[ "$failed" = 0 ]
