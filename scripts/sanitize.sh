#!/usr/bin/env bash
# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a build folder of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S . -B build-sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLORA_DA_SANITIZE=ON -DLORA_DA_TESTS=ON -DLORA_DA_CUDA=OFF
cmake --build build-sanitize --parallel 2
# oneDNN and OpenBLAS keep memory until the process ends, so leaks are looked for elsewhere.
export ASAN_OPTIONS=detect_leaks=0
LORA_DA_TEST_DEVICES=cpu,guarded-cpu build-sanitize/native_tests
# On the simulated GPU, where CUDA's headers are.
ctest --test-dir build-sanitize --output-on-failure -R '^(cuda_sim|native_cuda_sim)$'
