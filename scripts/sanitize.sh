#!/usr/bin/env bash
# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a build folder of their own.
#
#   scripts/sanitize.sh           on the CPU, plain and guarded; where CUDA's headers are also the simulator of CUDA by itself and all operations on the
#                                 simulated GPU
#   scripts/sanitize.sh --cuda    everything on the simulated GPU, a quarter of an hour
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
  cmake --build build-sanitize --parallel 2 --target cuda_sim_tests lora_da_cuda_sim
  ctest --test-dir build-sanitize --output-on-failure -R '^cuda_sim$'
  LORA_DA_TEST_DEVICES=cuda LORA_DA_TEST_SMALL=1 LORA_DA_CUDA_LIBRARY=$(find "$PWD/build-sanitize" -name liblora_da_cuda_sim.so -print -quit) OMP_WAIT_POLICY=passive \
    build-sanitize/native_tests '-sfe=*reference_test.cpp,*model_test.cpp,*collection_test.cpp,*init_test.cpp,*steady_step_test.cpp,*real_shape_test.cpp'
fi
