#!/usr/bin/env bash
# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a build folder of their own.
#
#   scripts/sanitize.sh           on the CPU, plain and guarded, and the simulator of CUDA by itself where CUDA's headers are
#   scripts/sanitize.sh --cuda    on the simulated GPU
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S . -B build-sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLORA_DA_SANITIZE=ON -DLORA_DA_TESTS=ON -DLORA_DA_CUDA=OFF
# oneDNN and OpenBLAS keep memory until the process ends, so leaks are looked for elsewhere.
export ASAN_OPTIONS=detect_leaks=0
if [ "${1:-}" = --cuda ]; then
  cmake --build build-sanitize --parallel 2
  ctest --test-dir build-sanitize --output-on-failure -R '^native_cuda_sim$'
  exit
fi
cmake --build build-sanitize --parallel 2 --target native_tests
LORA_DA_TEST_DEVICES=cpu,guarded-cpu build-sanitize/native_tests
targets=$(cmake --build build-sanitize --target help) # not into a pipe: grep ends with the first hit, and the build fails then
if grep -q cuda_sim_tests <<<"$targets"; then
  cmake --build build-sanitize --parallel 2 --target cuda_sim_tests
  ctest --test-dir build-sanitize --output-on-failure -R '^cuda_sim$'
fi
