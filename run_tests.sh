#!/usr/bin/env bash
# Run the test suite: ./run_tests.sh [pytest arguments], ./run_tests.sh -m gpu on a host with a GPU.
# Without arguments two tests run at a time: half of the suite waits for processes it has started.
#
# The first use makes .venv and installs, with the tools that developers need; an active environment that
# already imports what the tests import is used as it is.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/.ci/environment.sh"
use_environment "torch tyro tomli pytest pytest_timeout xdist hypothesis" "$root" dev

cd "$root"
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec "$python" -m pytest "$@"
