#!/usr/bin/env bash
# On a machine with a card and no network, in the root of the repository.
# go.sh 1: packages, then all that needs no model weights. go.sh 2: the second half of the
# model, then the chapters. Both on the same machine: what part 1 made must still be there.
set -u
part=$1
here=$(cd "$(dirname "$0")" && pwd)
base=$(dirname "$(mktemp -u)")/gpu
export HELPERS_CACHE=$base/cache PYTHONPATH=$base/site HF_HUB_OFFLINE=1
export PIP_NO_INDEX=1 PIP_FIND_LINKS=$base/model PIP_DISABLE_PIP_VERSION_CHECK=1
report() {
    python3 tests/gpu/report.py --out "$OUT" --plan "$base/plan.json" --seconds "$@"
}
if [ "$part" = 1 ]; then
    mkdir -p "$base/model" "$base/cache" "$base/results"
    cp "$here/plan.json" "$here/name" "$base/"
    cp "$here/part0" "$base/model/"
    python3 -m pip install -q --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$base/site" "$here"/wheels/*.whl || exit 1
    report "${2:-290}" env codes gpu_tests ladder
    cp "$OUT"/*.jsonl "$base/results/"
else
    cp "$base/results/"*.jsonl "$OUT/"
    cat "$base/model/part0" "$here/part1" >"$base/model/$(cat "$base/name")"
    rm "$base/model/part0"
    report "${2:-390}" model Chapter0 Chapter5 Chapter4 Chapter2 Chapter3
fi
