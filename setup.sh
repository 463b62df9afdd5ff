#!/usr/bin/env bash
# Installs what a target needs, once, and says so:  ./setup.sh run | test
#
# Everything goes into .venv, from PyPI; `test` adds the test packages and, from Debian's archive, chromium (the page
# is tested in it), curl, prometheus (copied into .venv, not installed) and, for tests on real Kafka, java and kcat.
# A stamp named after the contents of pyproject.toml and constraints.txt makes the second run need nothing at all.
set -euo pipefail
cd "$(dirname "$0")"

what=${1:?run or test}
python=${PYTHON:-python3}
venv=.venv
pins=$(cat pyproject.toml constraints.txt setup.sh | sha256sum | cut -c1-16)

say() { printf '\033[1m-- %s\033[0m\n' "$*" >&2; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

apt_install() {
    if [ "$(id -u)" = 0 ]; then sudo=(); elif command -v sudo >/dev/null; then sudo=(sudo); else
        fail "needs the Debian packages: $*. Ask an administrator to run: apt-get install $*"
    fi
    command -v apt-get >/dev/null || fail "needs $*, and this system has no apt-get: install them, then run this again"
    say "installing from Debian's archive: $*"
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

create_venv() {
    command -v "$python" >/dev/null || fail "no $python here: install Python 3.11 or newer (apt-get install python3)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "needs Python 3.11 or newer, $python is $("$python" -V 2>&1); try: make PYTHON=python3.12 ..."
    "$python" -c 'import ensurepip' 2>/dev/null || apt_install python3-venv
    say "creating $venv"
    "$python" -m venv "$venv"
}

pip_install() {
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-input -c constraints.txt "$@"
}

install_packages() {
    # torch alone first: a plain requirement of another package would take a newer, larger build.
    say "installing PyTorch into $venv (about 200 MB for the CPU; once)"
    pip_install "$(grep '^torch==' constraints.txt)"
    say "installing Headwater and its packages into $venv (a minute or two; once)"
    pip_install -e .
    say "compiling the learner's kernels (two minutes; once)"
    compile_kernels &  # takes one core; what comes next, the other
    local kernels=$!
    if [ "$what" = test ]; then install_for_tests; fi
    wait "$kernels" || fail "the kernels could not be compiled"
}

install_for_tests() {
    pip_install -e '.[test]'
    install_test_programs
}

compile_kernels() {
    "$venv/bin/python" -c 'from model import learner, ranker
learner.warm_up()
ranker.warm_up(learner.Learner().matrix)'
}

install_test_programs() {
    local missing=()
    command -v chromium >/dev/null || missing+=(chromium)
    command -v curl >/dev/null || missing+=(curl)
    if [ -n "${HEADWATER_TEST_KAFKA:-}" ]; then
        command -v java >/dev/null || missing+=(default-jre-headless)
        command -v kcat >/dev/null || missing+=(kcat)
    fi
    if [ ${#missing[@]} -gt 0 ]; then apt_install "${missing[@]}"; fi
    if ! [ -x "$venv/bin/promtool" ]; then copy_prometheus; fi
}

copy_prometheus() {
    if command -v promtool >/dev/null && command -v prometheus >/dev/null; then return; fi
    say "fetching prometheus from Debian's archive into $venv (the tests run it; no service is installed)"
    local folder
    folder=$(mktemp -d)
    chmod 777 "$folder"  # apt downloads as a user of its own
    (cd "$folder" && { apt-get download -qq prometheus || { apt_update; apt-get download -qq prometheus; }; } >&2)
    dpkg -x "$folder"/prometheus_*.deb "$folder/unpacked"
    install "$folder"/unpacked/usr/bin/prometheus "$folder"/unpacked/usr/bin/promtool "$venv/bin/"
    rm -r "$folder"
}

apt_update() {
    if [ "$(id -u)" = 0 ]; then apt-get update -qq; else sudo apt-get update -qq; fi
}

case $what in run | test) ;; *) fail "unknown: $what" ;; esac
[ -x "$venv/bin/python" ] || create_venv
if ! [ -e "$venv/installed-$what-$pins" ]; then
    install_packages
    rm -f "$venv"/installed-*
    touch "$venv/installed-run-$pins" "$venv/installed-$what-$pins"
fi
if [ "$what" = test ]; then install_test_programs; fi
