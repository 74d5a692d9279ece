#!/usr/bin/env bash
# The main job, on real disks: two VMs, five disks, one call each; then an incremental of one, read
# back; then everything is taken down.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/reconciler-demo.XXXXXX")
PATH="$PATH:/usr/sbin:/sbin"
appliance=""
serve=""

. "$here/second-act.sh" # say, show, second_act

clean_up() {
    status=$?
    trap - EXIT
    cd "$work"
    [ "$status" -eq 0 ] || for vm in ctx-101 ctx-102 look-into-ctx-101; do
        # One by one: what was never applied is refused, and would keep the others up.
        reconciler stop "$vm" --cancel-run --kill-clients -y >/dev/null 2>&1 || true
    done
    for process in $serve $appliance; do
        kill "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
    cd / && rm -rf "$work"
    [ "$status" -eq 0 ] || echo "the demo failed (exit $status); everything it started is ended" >&2
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

cp "$here/reconciler.yaml" "$here/inventory.yaml" "$work/"
cd "$work"
unset RECONCILER_CONFIG RECONCILER_STATE
(umask 077 && head -c 18 /dev/urandom | base64 >password)

say "Five source disks with real ext4 file systems and real files"
disk() { # VM KEY MIB FILES_FROM
    mkdir -p "sources/$1" "files"
    rm -rf files && mkdir files && cp -r "$4" files/
    head -c $(($3 * 300000)) /dev/urandom >files/data.bin
    echo "disk $2 of $1" >files/who-am-i
    truncate -s "$3M" "sources/$1/$2.raw"
    mke2fs -q -F -t ext4 -L "$1-$2" -d files "sources/$1/$2.raw"
}
disk web1 2000 64 "$root/reconciler"
disk web1 2001 96 "$root/docs"
disk db1 2000 64 "$root/reconciler"
disk db1 2001 128 "$root/examples"
disk db1 2016 48 "$root/docs"
rm -rf files
ls -lh sources/*/*.raw | awk '{print "  " $5 "\t" $9}'

say "The hub's ear: takes what the appliance's client reports, and brings runs to their end"
RECONCILER_API_LISTEN=127.0.0.1:$("${PYTHON:-python3}" -c '
import socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    print(free.getsockname()[1])')
export RECONCILER_API_LISTEN
reconciler serve >serve.out 2>&1 &
serve=$!
for _ in $(seq 100); do [ -s serve.out ] && break || sleep 0.1; done
cat serve.out

say "The node appliance: takes one call per VM, and copies every disk over NBD"
"${PYTHON:-python3}" "$root/examples/node-appliance/appliance.py" --listen 127.0.0.1:0 \
    --hub "http://$RECONCILER_API_LISTEN" --port-file port --sources sources --log calls.jsonl \
    --slow 3 >appliance.out 2>&1 &
appliance=$!
for _ in $(seq 100); do [ -s port ] && break || sleep 0.1; done
[ -s port ] || { cat appliance.out >&2; exit 1; }
sed -i "s|127.0.0.1:9081|127.0.0.1:$(cat port)|" reconciler.yaml
cat appliance.out

say "What should be true"
cat "$root/specs/demo.yaml"
say "What would be done"
show reconciler plan -f "$root/specs"
say "Do it"
show reconciler apply -f "$root/specs" -y
say "What is there now: the appliance is writing"
show reconciler status
say "Stay until the runs have ended"
show reconciler apply -f "$root/specs" -y --wait --timeout 2m
show reconciler status
say "What happened to each run, and who asked for it"
show reconciler history ctx-101
show reconciler history ctx-102
say "Again: nothing to do, and nobody is called twice"
show reconciler plan -f "$root/specs"
echo "calls that the appliance accepted: $(grep -c '"event": "start"' calls.jsonl) (one per VM)"

say "Did every disk arrive under the right key?"
for vm in ctx-101:web1 ctx-102:db1; do
    for source in "sources/${vm#*:}"/*.raw; do
        key=$(basename "$source" .raw)
        image="repository/${vm%%:*}/$key/demo-1.qcow2"
        printf '%s disk %s: ' "${vm%%:*}" "$key"
        qemu-img compare -f raw -F qcow2 "$source" "$image"
    done
done

second_act ctx-101 2001 sources/web1/2001.raw demo-2 "$root/specs"

say "Take it down; images and history stay"
printf 'vms:\n  - {name: ctx-101, state: absent}\n  - {name: ctx-102, state: absent}\n' >absent.yaml
show reconciler apply -f absent.yaml -y
show reconciler status
left=$(grep -la '[h]ub=demo-hub' /proc/[0-9]*/cmdline 2>/dev/null | wc -l) || true
echo "servers left: $left"
[ "$left" -eq 0 ]
