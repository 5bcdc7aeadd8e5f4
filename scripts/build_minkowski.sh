#!/usr/bin/env bash
# Build MinkowskiEngine 0.5.4 (CPU only) once and install it into a virtual environment that already holds torch.
#
#   scripts/build_minkowski.sh VENV
#
# The build takes 6 to 10 minutes on 2 cores. The wheel is kept outside the tree, one per Python and torch version,
# so that later calls install it in seconds. Needs a C++ compiler and OpenBLAS's headers (Debian: libopenblas-dev).
set -euo pipefail

venv=${1:?usage: scripts/build_minkowski.sh VENV}
version=0.5.4
python=$(cd "$venv/bin" && pwd)/python
[ -x "$python" ] || { echo "build_minkowski: no Python in $venv; run 'make install' first" >&2; exit 2; }

if "$python" - <<'PY' 2>/dev/null
import collections, collections.abc
collections.Sequence = collections.abc.Sequence  # MinkowskiEngine 0.5.4 still uses the name that Python 3.10 removed
import MinkowskiEngine
PY
then
    echo "MinkowskiEngine is installed in $venv"
    exit 0
fi

tags=$("$python" -c 'import sys, torch; print(f"py{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}")')
cache=${BIFUSION_DIAG_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/bifusion-diag}/minkowski/$tags
mkdir -p "$cache"

if ! ls "$cache"/MinkowskiEngine-$version-*.whl >/dev/null 2>&1; then
    command -v g++ >/dev/null || { echo "build_minkowski: g++ is missing (Debian: apt-get install g++)" >&2; exit 2; }
    if ! echo '#include <cblas.h>' | g++ -E -x c++ - -I/usr/include/openblas -I/usr/include/x86_64-linux-gnu >/dev/null 2>&1; then
        echo "build_minkowski: cblas.h is missing (Debian: apt-get install libopenblas-dev)" >&2
        exit 2
    fi
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # The sdist's setup.py needs old build tools. They live in a venv of their own that sees VENV's torch through a
    # .pth file; that path comes after the venv's own packages, so the old setuptools and numpy win during the build.
    "$python" -m venv "$work/build"
    "$work/build/bin/pip" install -q 'setuptools<60' wheel ninja 'numpy<1.26'
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$site" >"$("$work/build/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
    echo "building MinkowskiEngine $version for $tags, once, into $cache (6 to 10 minutes on 2 cores)"
    if ! CPU_ONLY=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} PATH="$work/build/bin:$PATH" "$work/build/bin/pip" wheel -q --no-deps \
        --no-build-isolation --wheel-dir "$work/wheel" "MinkowskiEngine==$version" >"$cache/build.log" 2>&1; then
        tail -n 30 "$cache/build.log" >&2
        echo "build_minkowski: the build failed; the whole log is $cache/build.log" >&2
        exit 1
    fi
    mv "$work"/wheel/*.whl "$cache/"
fi
"$python" -m pip install -q --no-deps "$cache"/MinkowskiEngine-$version-*.whl
echo "MinkowskiEngine $version is installed in $venv"
