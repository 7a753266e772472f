# Sourced by the other scripts: `use_venv EXTRA` makes .venv in the repository if there is none,
# installs the package with that extra ("" for none), and puts the environment on the PATH.

unset CDPATH
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer with its venv module is needed; none is on the PATH" >&2
    exit 2
}

use_venv() {
    local extra="$1" python stamp mark
    unset PYTHONHOME PYTHONPATH
    # pip comes into it last: without pip an earlier attempt was interrupted.
    if [ ! -x "$repo/.venv/bin/python" ] ||
        ! compgen -G "$repo/.venv/lib/*/site-packages/pip" >/dev/null; then
        python="$(find_python)"
        echo "making the virtual environment .venv with $("$python" --version)" >&2
        "$python" -m venv "$repo/.venv"
    fi
    export VIRTUAL_ENV="$repo/.venv" PATH="$repo/.venv/bin:$PATH"
    # The stamp holds what was installed, so that a second call does nothing and a change does.
    stamp="$repo/.venv/.installed-${extra:-base}"
    mark="$(cat "$repo/pyproject.toml" "$repo/constraints.txt" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$mark" ]; then
        echo "installing jaxgrpo${extra:+[$extra]} (a minute or a few, once)" >&2
        if [ "$extra" = test ]; then
            # By itself first: a machine that offers a CPU build then takes it.
            python -m pip install --quiet --disable-pip-version-check \
                "$(grep -o 'torch==[0-9.]*' "$repo/pyproject.toml")"
        fi
        (cd "$repo" && python -m pip install --quiet --disable-pip-version-check \
            ${extra:+--constraint constraints.txt} --editable ".${extra:+[$extra]}")
        echo "$mark" >"$stamp"
    fi
}
