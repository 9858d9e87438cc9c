#!/usr/bin/env bash
# Builds the CUDA device for CUDA 12 and 13 and every architecture that their compilers know, in a folder of its own. Fails where a kernel spills registers
# or a shared object does not open. Needs no GPU; toolkits that no folder holds are fetched (cuda-toolkit.sh).
#
#   scripts/cuda-builds.sh [12|13]      default: both. LORA_DA_CUDA_ARCHITECTURES in the environment, as in 80;90: those only
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# = 0 ]; then set -- 12 13; fi
bash scripts/setup.sh # the add-on, which opens them
targets=()
for version; do
  bash scripts/cuda-toolkit.sh "$version"
  targets+=("lora_da_cuda${version}_resources")
done
cmake -S . -B build-cuda -DCMAKE_BUILD_TYPE=Release -DLORA_DA_CPU=OFF -DLORA_DA_CUDA=ON -DLORA_DA_CUDA_SIM=OFF \
  "-DLORA_DA_CUDA_ARCHITECTURES=${LORA_DA_CUDA_ARCHITECTURES:-}"
cmake --build build-cuda --parallel "$(nproc)" --target "${targets[@]}"
for version; do
  ctest --test-dir build-cuda --output-on-failure -R "^cuda${version}_no_spills$"
done
LORA_DA_TEST_CUDA_BUILDS=$PWD/build-cuda node --import tsx --test --test-name-pattern 'shared object of CUDA' test/cuda.test.ts
