#!/usr/bin/env bash
# On a machine with a card and no network, in the root of the repository.
# go.sh 1: packages, then all that needs no model weights. go.sh 2: the second half of the
# model, then the chapters. Both on the same machine: what part 1 made must still be there.
# Stages that share no numbers run side by side, each group with results of its own, which
# `join.py` puts together; llama.cpp is compiled for the card meanwhile.
set -u
part=$1
here=$(cd "$(dirname "$0")" && pwd)
base=$(dirname "$(mktemp -u)")/gpu
export HELPERS_CACHE=$base/cache PYTHONPATH=$base/site HF_HUB_OFFLINE=1
export PIP_NO_INDEX=1 PIP_FIND_LINKS=$base/model PIP_DISABLE_PIP_VERSION_CHECK=1
report() { # seconds, name of the group, stages
    python3 tests/gpu/report.py --out "$OUT/$2" --plan "$base/plan.json" --seconds "$1" \
        "${@:3}" >"$OUT/$2.log" 2>&1
}
compiled() { compgen -G "$HELPERS_CACHE/llama.cpp-*-cuda/build.json" >"$base/compiled"; }
if [ "$part" = 1 ]; then
    mkdir -p "$base/model" "$base/cache"
    cp "$here/plan.json" "$here/name" "$base/"
    cp "$here/part0" "$base/model/"
    tar -xJf "$here/wheels.tar.xz" -C "$base"
    tar -xJf "$here/llama.cpp.tar.xz" -C "$base/cache"
    python3 -m pip install -q --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$base/site" "$base"/wheels/*.whl || exit 1
    if command -v nvcc; then
        # A toolkit may be without cuBLAS, which PyTorch has brought along.
        blas=$(python3 -c 'import torch, os; print(os.path.dirname(torch.__file__))')/../nvidia/cu13
        [ -f "$(dirname "$(readlink -f "$(command -v nvcc)")")/../include/cublas_v2.h" ] ||
            export CMAKE_ARGS="-DGGML_CUDA_NO_VMM=ON -DCMAKE_CUDA_FLAGS=-I$blas/include
                -DCUDA_cublas_LIBRARY=$blas/lib/libcublas.so.13
                -DCUDA_cublasLt_LIBRARY=$blas/lib/libcublasLt.so.13
                -DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath,$blas/lib"
        setsid nice -n 19 python3 -c \
            'from helpers import llamacpp; print(llamacpp.build(cuda=True))' \
            >"$base/llama.cpp.log" 2>&1 &
        nvidia-smi
    fi
    report "${2:-200}" first env codes gpu_tests &
    tests=$!
    report "${2:-200}" ladder ladder &
    wait "$tests" $!
else
    cat "$base/model/part0" "$here/part1" >"$base/model/$(cat "$base/name")"
    rm "$base/model/part0"
    seconds=${2:-240}
    until=$((SECONDS + seconds))
    report "$seconds" training Chapter0 Chapter5 &
    training=$!
    report "$seconds" layers model Chapter2 Chapter3 &
    layers=$!
    report "$seconds" data Chapter4
    while ! compiled && [ $SECONDS -lt $((until - 90)) ]; do sleep 1; done
    compiled && report $((until - SECONDS)) serving Chapter6
    wait "$training" "$layers"
fi
if [ "$part" = 2 ] && compiled; then # to be carried there again
    tar -cJf - -C "$base/cache" $(xargs dirname <"$base/compiled" | xargs -n 1 basename) |
        split -b 15M - "$OUT/llama.cpp-cuda.tar.xz."
fi
tail -n 25 "$OUT"/*.log
[ ! -f "$base/llama.cpp.log" ] || tail -c 600 "$base/llama.cpp.log" | tee "$OUT/llama.cpp.log"
tar -cJf "$OUT/results.tar.xz" -C "$OUT" --remove-files $(ls "$OUT" | grep -v tar.xz)
