# shellcheck shell=bash
# Sourced by run.sh, and by a test: files change on a disk of a VM that has a completed run; an
# incremental run, a restore of it, and the changed file read out of the restored disk.

say() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
show() { printf '\033[1m$ %s\033[0m\n' "$*"; "$@"; }

second_act() { # VM KEY SOURCE RUN SPECS
    local vm=$1 key=$2 source=$3 run=$4 specs=$5 port export restored

    say "Files change on disk $key of $vm"
    echo "written after the full backup, before $run" >news.txt
    show debugfs -w -f /dev/stdin "$source" <<END 2>/dev/null
write news.txt news.txt
rm who-am-i
write news.txt who-am-i
END

    say "An incremental run: its images hold what changed, and build on the run before"
    show reconciler backup "$vm" --run "$run" --type incremental -f "$specs" --apply -y --wait \
        --timeout 2m

    show reconciler chain "$vm"

    say "Look into it: its disks, read-only, beside whatever else runs"
    printf 'vms:\n  - {name: look-into-%s, state: exported, for: restore, of: {vm: %s, run: %s}}\n' \
        "$vm" "$vm" "$run" >restore.yaml
    cat restore.yaml
    show reconciler apply -f restore.yaml -y
    read -r port export < <(reconciler status "look-into-$vm" -o json | "${PYTHON:-python3}" -c '
import json, sys
(vm,) = json.load(sys.stdin)["vms"]
(disk,) = [one for one in vm["disks"] if one["key"] == sys.argv[1]]
print(disk["port"], disk["export"])' "$key")
    restored=restored-$key.raw
    show nbdcopy "nbd://127.0.0.1:$port/$export" "$restored"
    show debugfs -R 'ls -l /' "$restored" 2>/dev/null
    show debugfs -R 'cat /who-am-i' "$restored" 2>/dev/null
    cmp "$restored" "$source" && echo "the restored disk is the source, bit for bit"

    say "The same without a port, as a check after each backup; the result stays with the run"
    show reconciler restore-test "$vm" --run "$run" --file /who-am-i
    show reconciler history "$vm" --limit 1

    sed 's/state: exported/state: absent/; s/, for: restore.*/}/' restore.yaml >gone.yaml
    show reconciler apply -f gone.yaml -y
    rm -f "$restored" news.txt
}
