#!/usr/bin/env bash
# Makes a folder that nvcc compiles and links with (CUDA 13.0: compiler, headers, cuBLAS, cuSOLVER) out of the wheels that NVIDIA publishes on PyPI, for
# machines where no CUDA toolkit is installed. 1.3 GB; nothing happens where the folder is complete. There are no such wheels of CUDA 12's nvcc: for
# liblora_da_cuda12.so build where NVIDIA's own toolkit 12 is installed.
#
#   scripts/cuda-toolkit.sh [FOLDER]      default: .cuda/13, where the build looks for it
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.cuda/13}

wheels=(
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
  nvidia-cublas==13.1.2.11 nvidia-cusolver==12.0.9.81 nvidia-cusparse==12.6.3.3 nvidia-nvjitlink==13.0.88
)
mark="$folder/.complete"
[ "$(cat "$mark" 2>/dev/null)" = "${wheels[*]}" ] && exit 0

if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
  echo "cuda-toolkit.sh: the wheels are those of Linux on x86-64; install NVIDIA's CUDA toolkit and set CUDA_HOME" >&2
  exit 1
fi
if ! python3 -m pip --version >/dev/null 2>&1; then
  echo "cuda-toolkit.sh: pip is missing: sudo apt-get install python3-pip" >&2
  exit 1
fi

# Made aside, on the same file system, and renamed: an interrupted run leaves no folder that looks whole.
mkdir -p "$(dirname "$folder")"
aside=$(mktemp -d "$(dirname "$folder")/.making-XXXXXX")
trap 'rm -rf "$aside"' EXIT
echo "Fetching a CUDA toolkit from PyPI into $folder (1.3 GB)" >&2
mkdir "$aside/tmp"
if ! TMPDIR="$aside/tmp" python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-cache-dir \
  --no-deps --no-compile --only-binary :all: --target "$aside/wheels" "${wheels[@]}" >&2; then
  echo "cuda-toolkit.sh: pip could not fetch the wheels (see above); install NVIDIA's CUDA toolkit and set CUDA_HOME instead" >&2
  exit 1
fi

# The wheels hold one tree, nvidia/cu13, in pieces.
made="$aside/wheels/nvidia/cu13"
chmod +x "$made"/bin/* "$made"/nvvm/bin/*
for library in "$made"/lib/lib*.so.*; do
  file=$(basename "$library")
  ln -sf "$file" "$made/lib/${file%%.so.*}.so"
done
ln -sfn lib "$made/lib64"
if ! "$made/bin/nvcc" --version >/dev/null; then
  echo "cuda-toolkit.sh: the nvcc that was fetched does not run on this machine" >&2
  exit 1
fi
echo "${wheels[*]}" >"$made/.complete"
rm -rf "$folder"
mv "$made" "$folder"
