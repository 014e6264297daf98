#!/usr/bin/env bash
# What CI runs: install, lint, wheel, test. Every stage runs even after one has failed (but for install, which the
# others need), so that one run shows all there is to fix. Tests come last: a reader looks for their summary.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LIMIT_S=2400 # all stages together; a stage past it is stopped and counts as failed
failed=()

stage() {
    local name=$1 start=$SECONDS status=0
    echo "== $name"
    timeout --kill-after=30 "$((LIMIT_S > SECONDS ? LIMIT_S - SECONDS : 1))" bash "ci/$name.sh" || status=$?
    report+="   $name: $((SECONDS - start)) s, exit $status"$'\n'
    ((status == 124)) && echo "ci: $name was stopped: the limit of $LIMIT_S s for the whole run is used up" >&2
    ((status == 0)) || failed+=("$name")
    return "$status"
}

report=""
if stage install; then
    for name in lint wheel test; do stage "$name"; done
fi
printf '== %s s\n%s' "$SECONDS" "$report"
if ((${#failed[@]})); then
    echo "ci: failed: ${failed[*]}" >&2
    exit 1
fi
