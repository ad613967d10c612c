#!/bin/sh
# Large networks on one GPU, ours against the rivals, in one call of at most nine minutes: see gpu.py, which does it all.
set -eu
cd "$(dirname "$0")/.."
limit=""
if command -v timeout >/dev/null 2>&1; then limit="timeout -k 5 540"; fi
exec $limit python benchmarks/gpu.py "$@"
