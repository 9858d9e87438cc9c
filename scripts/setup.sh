#!/usr/bin/env bash
# Brings a checkout to the point where everything runs: system packages, npm packages, the add-on, the compiled TypeScript. What is there already is
# left alone, so that a second run takes a few seconds.
#
#   scripts/setup.sh            what users need; the CUDA device too, where a CUDA toolkit is installed
#   scripts/setup.sh --tests    also what the tests need: a CUDA toolkit in .cuda where none is installed (LORA_DA_CUDA=OFF in the environment: without)
set -euo pipefail
cd "$(dirname "$0")/.."
tests=
[ "${1:-}" = --tests ] && tests=yes

# Installs the Debian packages that are missing, or names them.
need() {
  local package missing=()
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  if [ "$(id -u)" -ne 0 ]; then
    echo "lora-da needs these system packages: sudo apt-get install ${missing[*]}" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# Two kinds of GPU, so that the tests compile every kernel without taking long; other values come from the environment.
configure() {
  npx --no-install cmake-js configure --CDLORA_DA_CUDA="${LORA_DA_CUDA:-AUTO}" --CDLORA_DA_CUDA_ARCHITECTURES="${LORA_DA_CUDA_ARCHITECTURES:-80;90}"
}

need g++ make cmake ninja-build libdnnl-dev libopenblas-openmp-dev
[ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --no-audit --no-fund
if [ -n "$tests" ]; then
  configure
  if [ "${LORA_DA_CUDA:-AUTO}" != OFF ] && [ "$(uname -m)" = x86_64 ] && grep -q '^CUDA_TOOLKITS:INTERNAL=$' build/CMakeCache.txt; then
    python3 -m pip --version >/dev/null 2>&1 || need python3-pip
    bash scripts/cuda-toolkit.sh
    configure
  fi
fi
npm run --silent build
