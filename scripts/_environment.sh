#!/usr/bin/env bash
# Makes an environment of this project, or leaves it alone when it is up to date.
#
#   scripts/_environment.sh .venv        everything but torch_npu
#   scripts/_environment.sh .venv-npu    with torch_npu, for tests/emulator and the demo
#   scripts/_environment.sh .venv-docs   what builds the site, without torch
#   scripts/_environment.sh .venv-3.13   as .venv, of python3.13
#
# PYTHON names the interpreter of the first three (default: python3); the pinned diffusers and
# transformers need 3.11. Exit status 2: there is no such interpreter, or the environment is not
# ours; 3: torch_npu cannot be installed here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=${1:-.venv}
wanted=${PYTHON:-python3}
working() { # working 3.13: on the path, where pyenv has shims that only fail, or among pyenv's
    local candidate
    for candidate in "python$1" "$HOME/.pyenv/versions/$1".*/bin/python; do
        if "$candidate" -c '' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "python$1"
}
say() { printf '%s: %s\n' "$name" "$*" >&2; }
case $name in
    .venv) extras=diffusers,demo,dev ;;
    .venv-npu) extras=diffusers,emulator,dev ;;
    .venv-docs) extras=docs ;;
    .venv-3.*) extras=diffusers,demo,dev wanted=$(working "${name#.venv-}") ;;
    *) say "unknown environment; there are .venv, .venv-npu, .venv-docs and .venv-3.*"; exit 2 ;;
esac

"$wanted" -c '' 2>/dev/null || { say "no $wanted found; set PYTHON to a Python >= 3.11"; exit 2; }
# The interpreter that an active environment was made from: an environment cannot replace itself.
python=$("$wanted" -c 'import sys; print(getattr(sys, "_base_executable", "") or sys.executable)')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { say "$wanted is $("$python" -V); set PYTHON to a Python >= 3.11"; exit 2; }

# Two digests: where the first differs, the environment is made anew (one cannot be moved, so the
# folder counts); where only the second does, packages are brought up to date in place.
stamp=$name/mindiesd-stamp
read -r made_from installed_from < <("$python" - "$PWD" "$extras" <<'PY'
import hashlib, pathlib, sys
made_from = "\0".join([sys.version, *sys.argv[1:]]).encode()
files = [pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "setup.py",
         "mindiesd/compiled/rows.c", "mindiesd/compiled/rows.h")]
print(*(hashlib.sha256(text).hexdigest() for text in (made_from, b"\0".join(files))))
PY
)
had_made='' had_installed=''
[[ -f $stamp ]] && read -r had_made had_installed <"$stamp"
if [[ -e $name && ! -f $stamp ]]; then
    say "$PWD/$name exists and was not made by this script; move it away first"
    exit 2
elif [[ $had_made != "$made_from" || ! -x $name/bin/python ]]; then
    say "making it with $("$python" -V); the first time downloads its packages, which takes minutes"
    rm -rf "$name"
    mkdir "$name"
    echo unfinished >"$stamp"
    "$python" -m venv "$name" || {
        say "$python cannot make environments; on Debian and Ubuntu, install python3-venv"
        rm -rf "$name"
        exit 2
    }
elif [[ $had_installed == "$installed_from" ]]; then
    exit 0
else
    say "bringing it up to date with pyproject.toml and constraints.txt"
fi
echo "$made_from unfinished" >"$stamp"
# The constraints pin torch in every call, so nothing that depends on it can bring another one.
install() {
    "$name/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
        -c constraints.txt "$@"
}
[[ $name == .venv-docs ]] || install torch
if [[ $name == .venv-npu ]] && ! install torch_npu; then
    say "torch_npu cannot be installed for $("$python" -V) on $(uname -sm)"
    exit 3
fi
install -e ".[$extras]"
echo "$made_from $installed_from" >"$stamp"
