#!/usr/bin/env bash
# Everything there is to learn from a GPU, in one command and at most twelve minutes on 16 cores: builds the extension in
# place for the GPU at hand and the torch of PYTHON (default python3), runs tests/cuda in shards, compute-sanitizer on a
# selection, and the benchmarks, and writes docs/performance_gpu.md. Takes no network. What fails is said in the end and
# in the page; everything else is done all the same.
#
#   benchmarks/gpu.sh [RESULTS]      RESULTS: folder for the logs, tables and JSON (default bench_results/gpu)
#   MINUTES=12                       when to be done
#   COMPUTE_SANITIZER=PATH           where it is not on PATH nor in CUDA_HOME
#   PAGE=docs/performance_gpu.md     what is written
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 OPTIM_EXT_CUDA=1
results=${1:-bench_results/gpu}
mkdir -p "$results" || exit
for old in steps.txt step_time.json one_pass.json lbfgs.json; do rm -f "$results/$old"; done
results=$(cd "$results" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
cores=$(nproc)
page=${PAGE:-docs/performance_gpu.md}
last=$((${MINUTES:-12} * 60 - 15)) # seconds, with some to write the page
failed=()

stop() {
  echo "benchmarks/gpu.sh: $*" >&2
  exit 1
}

# step NAME SECONDS COMMAND...: runs it within that time, and within all there is; shows its last lines, keeps all of them
# in RESULTS/NAME.log, and adds a line to RESULTS/steps.txt: its name, its seconds and how it ended.
step() {
  local name=$1 seconds=$2 start=$SECONDS left=$((last - SECONDS)) status end
  shift 2
  rm -f "$results/$name.log"
  ((seconds < left)) || seconds=$left
  if ((seconds < 5)); then
    echo "=== $name: no time left"
    printf '%s\t0\tno time left\n' "$name" >> "$results/steps.txt"
    failed+=("$name")
    return 1
  fi
  echo "=== $name: $*"
  timeout --kill-after=5 "$seconds" "$@" > "$results/$name.log" 2>&1
  status=$?
  tail -n "${SHOW:-25}" "$results/$name.log"
  case $status in 0) end=passed ;; 124 | 137) end="out of time" ;; *) end="failed ($status)" ;; esac
  echo "=== $name: $((SECONDS - start)) s, $end"
  printf '%s\t%d\t%s\n' "$name" $((SECONDS - start)) "$end" >> "$results/steps.txt"
  [ $status = 0 ] || failed+=("$name")
  return $status
}

"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
  stop "$PYTHON has no torch that sees a GPU (set PYTHON to one that has)"
missing=$("$PYTHON" - << 'END'
from importlib.util import find_spec

# What the build, the tests (torch.testing among them) and the tables need: module name, and package where it differs.
needs = {"setuptools": "setuptools>=70", "expecttest": "", "hypothesis": "", "matplotlib": "", "ninja": "", "numpy": ""}
print(*(package or module for module, package in (needs | {"pytest": ""}).items() if find_spec(module) is None))
END
)
if [ -n "$missing" ]; then
  # shellcheck disable=SC2086
  timeout 60 "$PYTHON" -m pip install --quiet --retries 1 $missing || echo "benchmarks/gpu.sh: missing: $missing" >&2
fi

# tests/cuda, every n-th test in each of n processes.
tests() {
  local shards=$((cores < 8 ? cores : 8)) ended=0 shard jobs=()
  for ((shard = 0; shard < shards; ++shard)); do
    OMP_NUM_THREADS=2 OPTIM_EXT_SHARD=$shard/$shards \
      "$PYTHON" -m pytest -q --no-header -p no:cacheprovider tests/cuda > "$results/tests-$shard.log" 2>&1 &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || ended=1; done
  grep -hE '^(FAILED|ERROR) ' "$results"/tests-*.log
  tail -qn 1 "$results"/tests-*.log
  return $ended
}

# A little of everything: sweeps with tables of all kinds, reductions, L-BFGS, a graph.
sanitizer() {
  local tool found=0
  tool=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")}
  [ -x "$tool" ] || { echo "compute-sanitizer is not there: $tool"; return 1; }
  for check in memcheck racecheck synccheck; do
    echo "--- $check"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$check" --error-exitcode 1 \
      "$PYTHON" -m pytest -q --no-header -p no:cacheprovider \
      "tests/cuda/test_grad_control.py::test_the_cpus_bits" "tests/cuda/test_lbfgs.py::test_equals_the_cpu" \
      "tests/cuda/test_numerics.py::test_frozen_and_thawed" -k 'float32 and not Adafactor' || found=1
  done
  return $found
}
export -f tests sanitizer
export cores results

if SHOW=5 step build 300 env MAX_JOBS="${MAX_JOBS:-$cores}" "$PYTHON" setup.py build_ext --inplace; then
  SHOW=60 step self-test 30 "$PYTHON" -m optim_ext
  step tests 180 bash -c tests
  SHOW=100 step step-time 210 "$PYTHON" benchmarks/step_time.py --device cuda --compiled none --repeats 7 --within 170 \
    --case billion gpt2 small-vectors resnet50 --output-dir "$results"
  step one-pass 40 "$PYTHON" benchmarks/one_pass.py --device cuda --repeats 7 --output-dir "$results"
  step lbfgs 60 "$PYTHON" benchmarks/lbfgs.py --device cuda --case 100k 1M-short many --rounds 5 --output-dir "$results"
  step sanitizer 60 bash -c sanitizer
else
  echo "benchmarks/gpu.sh: the build failed (nvcc is looked for in CUDA_HOME, the usual folder and on PATH)" >&2
fi
"$PYTHON" benchmarks/gpu_page.py "$results" "$page" || failed+=(page)
[ ${#failed[@]} = 0 ] || stop "failed: ${failed[*]} (logs in $results; the page says more)"
echo "All passed. Logs, tables and JSON are in $results, the page is $page."
