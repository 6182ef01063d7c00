#!/bin/sh
# The kernels' checks under g++'s address and undefined-behaviour sanitizers: sanitize.sh PYTHON [pytest arguments]. They
# run for every instruction set of the processor, or for those in CAPABILITIES. Any finding is a failure.
set -eu
python=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
export CXX="$here/sanitizing_compiler.sh" HF_HUB_OFFLINE=1
runtimes="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
: "${CAPABILITIES:=$("$python" -c '
from peft_s2a.activations.backends.compiled import CAPABILITIES, capability
names = list(CAPABILITIES)
print(*names[: names.index(capability()) + 1])')}"
checks="$here/test_compiled.py $here/test_kernel_layouts.py $here/test_not_finite.py::test_backends_agree_on_what_is_finite"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# CPython's own leaks are not asked for; findings go into files, since pytest captures what is printed.
export XDG_CACHE_HOME="$work/cache" ASAN_OPTIONS="detect_leaks=0:log_path=$work/found.asan"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$work/found.ubsan"
for capability in $CAPABILITIES; do
    echo "kernels for $capability, sanitized"
    export PEFT_S2A_CPU_CAPABILITY="$capability"
    failed=
    # Without a library all checks would be skipped.
    LD_PRELOAD="$runtimes" "$python" -c '
from peft_s2a.activations.backends.compiled import library
assert library(), "the kernels were not built"' &&
        LD_PRELOAD="$runtimes" "$python" -m pytest $checks -p no:cacheprovider "$@" || failed=yes
    for report in "$work"/found.*; do
        [ ! -s "$report" ] || { cat "$report"; failed=yes; }
    done
    [ -z "$failed" ] || exit 1
done
