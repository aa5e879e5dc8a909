#!/usr/bin/env bash
# What only a GPU can answer, in one call of less than ten minutes:  eval/gpu.sh OUT [SITE]
# OUT: where results go. SITE: a folder with env.sh that brings SGLang 0.5.23, where it is not installed. Goes on after a failure.
# What else pyproject.toml asks for and a machine without network lacks can come with it:
#   pip install --target SITE/site --python-version 3.12 --only-binary :all: --no-deps xxhash threadpoolctl
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$1"
python=${PYTHON:-python3}
out=$(cd "$1" && pwd)
[ $# -gt 1 ] && source "$2/env.sh"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
nvidia-smi > "$out/device.txt" 2>&1
for module in xxhash threadpoolctl psutil rich pytest numba pynvml cuda.bindings sgl_kernel; do
    "$python" -c "import $module" 2> /dev/null || echo "missing: $module" | tee -a "$out/device.txt"
done
pytest=("$python" -m pytest -v -p no:cacheprovider -o filterwarnings=)
parallel=()  # most of the time kernels are compiled
"$python" -c "import xdist" 2> /dev/null && parallel=(-n 4)
timeout 170 "${pytest[@]}" ${parallel[@]+"${parallel[@]}"} tests/gpu/test_kernels.py tests/gpu/test_layer.py 2>&1 | tee "$out/tests.txt"
failed=${PIPESTATUS[0]}
timeout 50 "${pytest[@]}" tests/gpu/test_packed.py 2>&1 | tee "$out/tests_packed.txt"
failed=$((failed | PIPESTATUS[0]))
# What tests/gpu/test_graphs.py asks, and how long steps take.
timeout 200 "$python" -m eval.decode_graphs 2>&1 | tee "$out/decode_graphs.txt"
graphs=${PIPESTATUS[0]}
timeout 120 "$python" -m eval.kernel_speed "$out/kernel_speed.json" 2>&1 | tee "$out/kernel_speed.txt"
exit $((failed | graphs | PIPESTATUS[0]))
