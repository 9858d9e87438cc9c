#!/usr/bin/env bash
# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a build folder of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S . -B build-sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLORA_DA_SANITIZE=ON -DLORA_DA_TESTS=ON
cmake --build build-sanitize --parallel 2 --target native_tests
# oneDNN and OpenBLAS keep memory until the process ends, so leaks are looked for elsewhere.
LORA_DA_TEST_DEVICES=cpu,guarded-cpu ASAN_OPTIONS=detect_leaks=0 build-sanitize/native_tests
