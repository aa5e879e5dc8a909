#!/usr/bin/env bash
# Decode speed beside unmodified SGLang's at the same bytes, in one call:  eval/gpu_decode.sh OUT [SITE [SECONDS [LAYERS]]]
# OUT, SITE: as of eval/gpu.sh. SECONDS: for all of it, by default 570. A checkpoint of Qwen3-30B-A3B's shapes is made first, of so
# many LAYERS (12: 16 GB, in $TMPDIR and in the page cache), and packed if that takes no more than 90 s.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"
python=${PYTHON:-python3}
out=$(cd "$1" && pwd)
deadline=$((SECONDS + ${3:-570}))
[ $# -gt 1 ] && [ -n "$2" ] && source "$2/env.sh"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
nvidia-smi > "$out/device.txt" 2>&1
model=$(mktemp -d "${TMPDIR:-/tmp}/shaped-XXXXXX")
trap 'rm -rf "$model"' EXIT
timeout 120 "$python" -m eval.shaped_model --output "$model" --layers "${4:-12}" 2>&1 | tail -n 3 || exit
packed=()
timeout 90 "$python" -m sglmoe.pack --model-path "$model" > "$out/pack.txt" 2>&1 && packed=(--packed)
"$python" -m eval.decode_speed "$out/decode_speed.json" --model "$model" --seconds $((deadline - SECONDS)) \
    ${packed[@]+"${packed[@]}"} 2>&1 | tee "$out/decode_speed.txt"
