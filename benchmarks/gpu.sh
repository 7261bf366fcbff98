#!/usr/bin/env bash
# Everything there is to learn from a GPU, in one command and under ten minutes: builds the extension in place against
# the torch of PYTHON (default python3), checks it, runs tests/cuda and measures.
#
#   benchmarks/gpu.sh [RESULTS]      RESULTS: folder for the logs, tables and JSON (default bench_results/gpu)
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 OPTIM_EXT_CUDA=1
results=${1:-bench_results/gpu}
mkdir -p "$results" || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

stop() {
  echo "benchmarks/gpu.sh: $*" >&2
  exit 1
}

# step NAME SECONDS COMMAND...: runs it within that time, and ten minutes in all; shows its last lines, keeps all of them
# in RESULTS/NAME.log.
step() {
  local name=$1 seconds=$2 start=$SECONDS left=$((590 - SECONDS)) status
  shift 2
  ((seconds < left)) || seconds=$left
  echo "=== $name: $*"
  timeout "$seconds" "$@" > "$results/$name.log" 2>&1
  status=$?
  tail -n "${SHOW:-25}" "$results/$name.log"
  echo "=== $name: $((SECONDS - start)) s, status $status$([ $status = 124 ] && echo ' (out of time)')"
  return $status
}

"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
  stop "$PYTHON has no torch that sees a GPU (pip install torch, or set PYTHON to one that has)"
missing=$("$PYTHON" - << 'END'
from importlib.util import find_spec

# What the build, the tests (torch.testing among them) and the tables need: module name, and package where it differs.
needs = {"setuptools": "setuptools>=70", "expecttest": "", "hypothesis": "", "matplotlib": "", "ninja": "", "numpy": ""}
needs |= {"pytest": "", "xdist": "pytest-xdist"}
print(*(package or module for module, package in needs.items() if find_spec(module) is None))
END
)
if [ -n "$missing" ]; then
  # shellcheck disable=SC2086
  "$PYTHON" -m pip install --quiet $missing || stop "install these first: $missing"
fi
# Only the table's rows for Lion, LAMB and LARS need this one.
"$PYTHON" -c 'import pytorch_optimizer' 2> /dev/null ||
  timeout 60 "$PYTHON" -m pip install --quiet --retries 1 'pytorch_optimizer>=3.5' ||
  echo "benchmarks/gpu.sh: pytorch_optimizer cannot be installed: without Lion, LAMB and LARS"

failed=()
cores=$(nproc)
SHOW=5 step build 300 env MAX_JOBS="${MAX_JOBS:-$cores}" "$PYTHON" setup.py build_ext --inplace ||
  stop "the build failed (nvcc is looked for in CUDA_HOME, the usual folder and on PATH)"
SHOW=60 step self-test 60 "$PYTHON" -m optim_ext || failed+=(self-test)
step tests 240 "$PYTHON" -m pytest -q -n "$((cores < 8 ? cores : 8))" tests/cuda || failed+=(tests)
SHOW=100 step step-time 240 "$PYTHON" benchmarks/step_time.py --device cuda --compiled none --output-dir "$results" || failed+=(step-time)
[ ${#failed[@]} = 0 ] || stop "failed: ${failed[*]} (logs in $results)"
echo "All passed. Logs, tables and step_time.json are in $results."
