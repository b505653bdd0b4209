#!/usr/bin/env bash
# Every number of one GPU in 10 minutes at most, into results/h100.txt; a part that fails or runs out of time
# leaves its message there, and the next one starts. Without a card:
#   DEVICE=cpu SHAPE="1 64 32" TIMES="64 128" STEPS=2 RUN=4 OUT=/tmp/gpu.txt bash results/gpu.sh
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
python() { echo; echo "\$ python $*"; command timeout "$limit" python "$@" || echo "exit code $?"; }
{
    date -u
    git rev-parse HEAD
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    some=mh-attention,mh-hyena,mh-gated-linear-attention,mamba,gated-deltanet,rwkv6-time-mixer
    limit=30
    python layers.py --device "$device" --no-loops --shape ${SHAPE:-8 1024 128}
    python layers.py --device "$device" --no-loops --shape ${SHAPE:-2 4096 512}
    for T in ${TIMES:-1024 4096 16384}; do                  # linear in T?
        python layers.py --device "$device" --no-loops --layers "$some" --shape 1 "$T" 128
    done
    limit=80
    python layers.py --device "$device" --compile --layers "$some" --shape ${SHAPE:-8 1024 128}
    limit=270
    python train.py --device "$device" --benchmark --compile on --steps "${STEPS:-40}"
    limit=90
    python train.py --device "$device" --batch-size 128 --steps "${RUN:-20000}" --early-stop 2 \
        --out "$(mktemp -d)"
} 2>&1 | tee "${OUT:-results/h100.txt}"
