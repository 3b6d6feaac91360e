#!/usr/bin/env bash
# Puts what the tests marked `edge` need into the folder that it is given, for pytest --edge=DIR: onnxruntime for
# JavaScript, onnxruntime's C++ headers, and by the system's packages node, npm, a compiler and a headless Chromium.
set -euo pipefail
folder=${1:?usage: tests/edge/setup.sh DIR}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder"
cd "$folder"

missing=()
command -v node > /dev/null && command -v npm > /dev/null || missing+=(nodejs npm)
command -v g++ > /dev/null || missing+=(g++)
command -v chromium-headless-shell > /dev/null || command -v chromium > /dev/null || missing+=(chromium-headless-shell)
if [ ${#missing[@]} -gt 0 ]; then
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" > /dev/null
fi

# without scripts: those of onnxruntime-node would download libraries for graphics cards
cp "$here/package.json" package.json
npm install --ignore-scripts --no-audit --no-fund --silent

# headers are in no package of their own; this one of another language ships them beside its libraries
archive=$(npm pack --silent com.github.asus4.onnxruntime@0.4.9)
tar --extract --gzip --file "$archive" --wildcards --strip-components=7 --one-top-level=include \
  'package/*/ios-arm64/onnxruntime.framework/Headers/*.h'
rm "$archive"

# What follows tells of processors and providers that this machine lacks; a test says so where it could not be had.
other_processors() {
  command -v qemu-x86_64 > /dev/null || DEBIAN_FRONTEND=noninteractive apt-get -qq install -y qemu-user > /dev/null
  # a Python of 64-bit ARM with numpy and the last onnxruntime that starts in qemu 7.2; newer ones crash there
  dpkg --add-architecture arm64 && apt-get -qq update && mkdir -p arm64/debs && cd arm64/debs || return 1
  local minor
  minor=$(apt-cache show python3-minimal:arm64 | sed -n 's/^Pre-Depends:.*python3\.\([0-9]*\)-minimal.*/\1/p' | head -1)
  apt-get -qq download "python3.$minor-minimal:arm64" "libpython3.$minor-minimal:arm64" \
    "libpython3.$minor-stdlib:arm64" libc6:arm64 libstdc++6:arm64 libgcc-s1:arm64 zlib1g:arm64 libexpat1:arm64 \
    libffi8:arm64 libbz2-1.0:arm64 liblzma5:arm64 libssl3:arm64 2> /dev/null || return 1
  cd .. && for package in debs/*.deb; do dpkg-deb -x "$package" root; done && ln -s "python3.$minor" root/usr/bin/python
  pip download --quiet --no-deps --dest wheels --only-binary=:all: --python-version "3.$minor" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    onnxruntime==1.22.1 "numpy<2.5" flatbuffers protobuf packaging sympy mpmath coloredlogs humanfriendly || return 1
  for wheel in wheels/*.whl; do python3 -m zipfile -e "$wheel" site; done
  rm -r debs wheels
}

cann() {
  python3 -m venv cann && cann/bin/pip install --quiet "numpy<2" onnxruntime-cann click onnx \
    "onnx-graphsurgeon>=0.6.1,<0.7" ml_dtypes networkx platformdirs pyyaml rich threadpoolctl
}

(other_processors) || echo "setup.sh: no emulated processors; their tests are skipped" >&2
(cann) || echo "setup.sh: no onnxruntime-cann; its test is skipped" >&2
