# Sourced by quickstart and test: make .venv and install the package with pinned versions.
# Usage: prepare_environment [extra]
prepare_environment() {
    local extra="${1:+[$1]}" python="" candidate
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python="$candidate"
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "selfcorrect needs Python 3.11 or newer; none was found on PATH" >&2
        return 2
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # A record of the installed extra and of the files it came from; unchanged files are not reinstalled.
    local wanted
    wanted="$extra $(cat pyproject.toml constraints.txt | cksum)"
    if [ "$(cat .venv/selfcorrect-installed 2>/dev/null)" != "$wanted" ]; then
        echo "installing into .venv (once)" >&2
        # torch first and by its exact version: a range would install the CUDA build on Linux.
        # Modules are compiled when they are first imported: most of the installed ones never are.
        local install=(.venv/bin/pip install --quiet --disable-pip-version-check --no-compile)
        "${install[@]}" "$(grep '^torch==' constraints.txt)"
        "${install[@]}" --constraint constraints.txt --editable ".$extra"
        echo "$wanted" >.venv/selfcorrect-installed
    fi
    unset PYTHONDONTWRITEBYTECODE # else every process would compile them anew
}
