#!/usr/bin/env bash
# Correctness of every kernel, then speed, on one GPU in less than nine minutes (once the environment is there).
#
#   benchmarks/gpu/run.sh                    on a GPU; results in $OUT, or benchmarks/gpu/results
#   benchmarks/gpu/run.sh --smoke            every section at toy size on the CPU: shows that the script works
#   PYTHON=/path/to/python benchmarks/gpu/run.sh     with that interpreter, whatever versions it has
#
# Takes the first Python with the needed torch and transformers: that of the shell, that of `make install`, one of its
# own. The last is made where none fits, from the default package index.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
own="${XDG_CACHE_HOME:-$HOME/.cache}/hymba-align/gpu"
torch_versions="torch>=2.13,<2.16" transformers_versions="transformers>=5.23,<5.24" # as in pyproject.toml
export PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

smoke=""
for argument in "$@"; do
  case $argument in
    --smoke) smoke=yes ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
  esac
done

if [[ -z $smoke && ! -e /dev/nvidiactl ]] && ! nvidia-smi --list-gpus >/dev/null 2>&1; then
  echo "no GPU here: nothing was measured; --smoke shows on the CPU that all sections work" >&2
  exit 1
fi

fits() { # whether the interpreter has what is needed, and without --smoke a GPU
  "$1" - "$smoke" <<'PYTHON' 2>/dev/null
import sys, torch, transformers
version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
fits = sys.version_info >= (3, 11) and (2, 13) <= version < (2, 16) and transformers.__version__.startswith("5.23.")
sys.exit(not (fits and (sys.argv[1] or torch.cuda.is_available())))
PYTHON
}

python=""
for candidate in "${PYTHON:-}" python3 "$root/.venv/bin/python" "$own/bin/python"; do
  if [[ -n $candidate ]] && { [[ $candidate == "${PYTHON:-}" ]] || fits "$candidate"; }; then
    python=$candidate
    break
  fi
done
if [[ -z $python && -n $smoke ]]; then
  echo "no Python with $torch_versions and $transformers_versions: run 'make install' first" >&2
  exit 1
fi
if [[ -z $python ]]; then
  python3 -m venv "$own"
  "$own/bin/python" -m pip install --quiet "$torch_versions" "$transformers_versions"
  python="$own/bin/python"
fi
exec "$python" -m gpu.run "$@"
