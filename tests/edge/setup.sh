#!/usr/bin/env bash
# Puts what the tests marked `edge` need into the folder that it is given, for pytest --edge DIR: onnxruntime for
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
