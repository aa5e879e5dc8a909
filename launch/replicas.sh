#!/usr/bin/env bash
# Replicas of one recipe, each on a GPU of its own, behind sglang-router on port 30000:
#
#     pip install sglang-router
#     launch/replicas.sh launch/24gb/qwen3-30b-a3b.toml 2 [--dry-run]
#
# The recipe's host memory is one server's: the machine needs it as often as there are replicas.
set -euo pipefail
recipe=${1:?a recipe, such as launch/24gb/qwen3-30b-a3b.toml}
replicas=${2:?how many}
if [[ ${3:-} == --dry-run ]]; then
    exec python -m sglmoe.recipe "$recipe" --dry-run
fi

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
urls=()
for ((gpu = 0; gpu < replicas; gpu++)); do
    port=$((30001 + gpu))
    CUDA_VISIBLE_DEVICES=$gpu python -m sglmoe.recipe "$recipe" --port "$port" &
    urls+=("http://127.0.0.1:$port")
done
# Prompts that begin alike go to the server that has their KV.
python -m sglang_router.launch_router --host 0.0.0.0 --port 30000 --policy cache_aware \
    --worker-startup-timeout-secs 3600 --worker-urls "${urls[@]}"
