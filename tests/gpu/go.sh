#!/usr/bin/env bash
# On a machine with a card and no network, in the root of the repository.
# go.sh 1: packages, then all that needs no model weights. go.sh 2: the second half of the
# model, then the chapters. Both on the same machine: what part 1 made must still be there.
# After the seconds come groups of stages, joined by commas: groups run side by side, each
# with results of its own, which `join.py` puts together.
set -u
part=$1
here=$(cd "$(dirname "$0")" && pwd)
base=$(dirname "$(mktemp -u)")/gpu
export HELPERS_CACHE=$base/cache PYTHONPATH=$base/site HF_HUB_OFFLINE=1
export PIP_NO_INDEX=1 PIP_FIND_LINKS=$base/model PIP_DISABLE_PIP_VERSION_CHECK=1
if [ "$part" = 1 ]; then
    mkdir -p "$base/model"
    cp "$here/plan.json" "$here/name" "$base/"
    cp "$here/part0" "$base/model/"
    tar -xJf "$here/wheels.tar.xz" -C "$base"
    python3 -m pip install -q --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$base/site" "$base"/wheels/*.whl || exit 1
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    seconds=${2:-200}
    groups=("${@:3}")
    [ ${#groups[@]} -gt 0 ] || groups=(env,codes,gpu_tests ladder)
else
    if [ -f "$base/model/part0" ]; then # else it has been put together before
        cat "$base/model/part0" "$here/part1" >"$base/model/$(cat "$base/name")"
        rm "$base/model/part0"
    fi
    seconds=${2:-250}
    groups=("${@:3}")
    [ ${#groups[@]} -gt 0 ] || groups=(Chapter0 Chapter5 model,Chapter2,Chapter3 Chapter4)
    # Once, before four of them ask for it.
    python3 -c 'from helpers import models; models.embedded_folder()'
fi
# As many threads as each group has cores: more of them would wait for one another.
cores=$(($(nproc) / ${#groups[@]}))
export OMP_NUM_THREADS=$((cores > 0 ? cores : 1))
for group in "${groups[@]}"; do
    python3 tests/gpu/report.py --out "$OUT/$group" --plan "$base/plan.json" \
        --seconds "$seconds" --stages "$group" >"$OUT/$group.log" 2>&1 &
done
wait
tail -n 25 "$OUT"/*.log
tar -cJf "$OUT/results.tar.xz" -C "$OUT" --remove-files "${groups[@]}" "${groups[@]/%/.log}"
