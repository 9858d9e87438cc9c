#!/usr/bin/env bash
# Brings a checkout to the point where everything runs: system packages, npm packages, the add-on, the compiled TypeScript. What is there already is
# left alone, so that a second run takes a few seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(g++ make cmake ninja-build libdnnl-dev libopenblas-openmp-dev)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" -ne 0 ]; then
    echo "lora-da needs these system packages: sudo apt-get install ${missing[*]}" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

[ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --no-audit --no-fund
npm run --silent build
