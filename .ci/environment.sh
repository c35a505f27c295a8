# Sourced by run_train.sh and run_tests.sh: finds or makes the Python environment.

# use_environment MODULES ROOT [EXTRA]: sets $python to an interpreter that imports MODULES, and PYTHONPATH so
# that ROOT's packages come first. An active environment that qualifies is used as it is; otherwise ROOT/.venv,
# made and installed (with EXTRA) when it does not qualify yet.
use_environment() {
  local modules=$1 root=$2 extra=${3:-}
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  python=$(command -v python || command -v python3 || true)
  if [ -n "$python" ] && has_modules "$python" "$modules"; then return; fi
  python="$root/.venv/bin/python"
  if [ -x "$python" ] && has_modules "$python" "$modules"; then return; fi
  install_environment "$root" "$extra"
}

# Finding a module's location is enough and costs milliseconds; importing torch would cost seconds.
has_modules() {
  "$1" -c 'import sys, importlib.util as u; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1].split()))' \
    "$2" 2>/dev/null
}

install_environment() {
  local root=$1 extra=$2 maker=${PYTHON:-python3}
  if ! "$maker" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Octavo needs Python 3.10 or newer; '$maker' is $("$maker" --version 2>&1 || true)" >&2
    echo "Install one, or name it: PYTHON=/path/to/python3 $0" >&2
    exit 2
  fi
  echo "setting up $root/.venv (once; installs torch, so this takes a while)"
  [ -x "$root/.venv/bin/python" ] || "$maker" -m venv "$root/.venv"
  if ! "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}"; then
    echo "error: installing Octavo's dependencies into $root/.venv failed (see above)" >&2
    exit 1
  fi
}
