#!/usr/bin/env bash
# Makes a folder that nvcc compiles and links with (compiler, headers, cuBLAS, cuSOLVER), for machines where no CUDA toolkit is installed: CUDA 13.0 out of
# the wheels that NVIDIA publishes on PyPI, 1.3 GB to fetch; CUDA 12.4 out of the packages of Debian 13 (non-free), 1.4 GB, since PyPI has no nvcc of
# CUDA 12. Versions and hashes are fixed. Nothing is installed into the system, and nothing happens where the folder is complete.
#
#   scripts/cuda-toolkit.sh [12|13] [FOLDER]      default: 13, and .cuda/12 or .cuda/13, where the build looks for it
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-13}
folder=${2:-.cuda/$version}

fail() {
  echo "cuda-toolkit.sh: $1" >&2
  exit 1
}

wheels=(
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
  nvidia-cublas==13.1.2.11 nvidia-cusolver==12.0.9.81 nvidia-cusparse==12.6.3.3 nvidia-nvjitlink==13.0.88
)
# SHA-256 and path in Debian's archive, as in its index of packages.
archive=http://deb.debian.org/debian/pool
packages="cd5fe85aee38d108b315f408a688641478f2402622a10c677478eb7a6c4e5319 non-free/n/nvidia-cuda-toolkit/nvidia-cuda-toolkit_12.4.131~12.4.1-2_amd64.deb
d846838f914a0176948d48a8bcade5d6dbcccb5c9374343f6475f5503f173ee0 non-free/n/nvidia-cuda-toolkit/nvidia-cuda-dev_12.4.127~12.4.1-2_amd64.deb
2ddc22809d16b157021a4d57db6b2221cf7c46f42654c95df86ce73beb15c1f7 non-free/n/nvidia-cuda-toolkit/libcublas12_12.4.5.8~12.4.1-2_amd64.deb
2f67754a6dd7095de1a5c4503f20539981f31f0cd627565973c547e997fc7732 non-free/n/nvidia-cuda-toolkit/libcublaslt12_12.4.5.8~12.4.1-2_amd64.deb
d2d87e726431ad44ca5ba7ba4e81619479b863341bf37e55cd7326501a5db33a non-free/n/nvidia-cuda-toolkit/libcusolver11_11.6.1.9~12.4.1-2_amd64.deb
c645f5d7e2fa78ff8f62f4844f696294fbd556e85c648b5550cca454b0b4f74b non-free/n/nvidia-cuda-toolkit/libcusparse12_12.3.1.170~12.4.1-2_amd64.deb
230ab96954cfc1fcc8eda7fe0fe9849a177cd80c62fe69b8b6966e6ef7bf26fd non-free/n/nvidia-cuda-toolkit/libnvjitlink12_12.4.127~12.4.1-2_amd64.deb
30e911c1909265591b5ea793df0e49e56bed631238b68b3e75c97590c4985686 main/c/cccl/libcu++-dev_2.3.2-2_all.deb"

# What the folder is made of: it is complete when it says so itself.
case $version in
  12) parts=$packages ;;
  13) parts=${wheels[*]} ;;
  *) fail "unknown version $version: there are 12 and 13" ;;
esac
mark="$folder/.complete"
[ "$(cat "$mark" 2>/dev/null)" = "$parts" ] && exit 0
if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
  fail "what it fetches is for Linux on x86-64; install NVIDIA's CUDA toolkit and set CUDA_HOME"
fi

# The wheels hold one tree, nvidia/cu13, in pieces.
make_13() {
  python3 -m pip --version >/dev/null 2>&1 || fail 'pip is missing: sudo apt-get install python3-pip'
  mkdir "$aside/tmp"
  TMPDIR="$aside/tmp" python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-cache-dir \
    --no-deps --no-compile --only-binary :all: --target "$aside/wheels" "${wheels[@]}" >&2 ||
    fail "pip could not fetch the wheels (see above); install NVIDIA's CUDA toolkit and set CUDA_HOME instead"
  mv "$aside/wheels/nvidia/cu13" "$made"
  chmod +x "$made"/bin/* "$made"/nvvm/bin/*
  local library file
  for library in "$made"/lib/lib*.so.*; do
    file=$(basename "$library")
    ln -sf "$file" "$made/lib/${file%%.so.*}.so"
  done
  ln -sfn lib "$made/lib64"
}

# The packages spread a toolkit over /usr. The static libraries, two gigabytes, are left out but for the runtime.
make_12() {
  command -v dpkg-deb >/dev/null || fail "dpkg-deb is missing: install dpkg, or NVIDIA's CUDA toolkit and set CUDA_HOME"
  command -v curl >/dev/null || fail 'curl is missing: sudo apt-get install curl'
  local hash path deb=$aside/package.deb usr=$aside/usr
  while read -r hash path; do
    curl --fail --silent --show-error --location --retry 3 --output "$deb" "$archive/$path" ||
      fail "could not fetch $archive/$path; install NVIDIA's CUDA toolkit and set CUDA_HOME instead"
    echo "$hash $deb" | sha256sum --check --quiet >&2 || fail "$archive/$path is not the file that is expected"
    dpkg-deb --fsys-tarfile "$deb" | tar --extract --directory "$aside" --exclude './usr/share' --exclude 'libn*.a' --exclude 'libcu[bfrs]*.a'
  done <<<"$packages"
  mkdir -p "$made/lib" "$made/nvvm/bin"
  rm "$usr/bin/compute-sanitizer" # a link to what stays behind
  mv "$usr/bin" "$usr/include" "$made"
  mv "$usr"/lib/nvidia-cuda-toolkit/bin/{nvcc,crt} "$made/bin"
  mv "$usr/lib/nvidia-cuda-toolkit/bin/cicc" "$made/nvvm/bin"
  mv "$usr/lib/nvidia-cuda-toolkit/libdevice" "$made/nvvm"
  mv "$usr"/lib/x86_64-linux-gnu/lib{cublas,cublasLt,cusolver,cusparse,nvJitLink}.so* "$usr"/lib/x86_64-linux-gnu/libcudart_static.a "$made/lib"
  ln -s lib "$made/lib64"
  # Where nvcc finds the rest, as in NVIDIA's own folders; Debian's names /usr.
  cat >"$made/bin/nvcc.profile" <<'PROFILE'
TOP                = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH              += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES          += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES         =+ $(_SPACE_) "-L$(TOP)/lib"
PROFILE
}

# Made aside, on the same file system, and renamed: an interrupted run leaves no folder that looks whole.
mkdir -p "$(dirname "$folder")"
aside=$(mktemp -d "$(dirname "$folder")/.making-XXXXXX")
trap 'rm -rf "$aside"' EXIT
made=$aside/made
echo "Fetching a CUDA toolkit $version into $folder (1.4 GB)" >&2
"make_$version"
"$made/bin/nvcc" --version >/dev/null || fail 'the nvcc that was fetched does not run on this machine'
echo "$parts" >"$made/.complete"
rm -rf "$folder"
mv "$made" "$folder"
