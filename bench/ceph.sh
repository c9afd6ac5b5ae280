#!/bin/bash
# A Ceph cluster of one node with an S3 gateway on 127.0.0.1, for tests: no container, all state below DIR.
#   apt-get install --no-install-recommends ceph-mon ceph-mgr ceph-osd radosgw ceph-common
#   bench/ceph.sh up DIR [PORT]     prints the lines to `export` for the tests; PORT (default 17000) to PORT + 20 are used
#   bench/ceph.sh kill-osd DIR      kill -9 of the daemon that holds the data, and a new one in its place
#   bench/ceph.sh down DIR          ends the daemons that `up` started
set -euo pipefail
command=${1:?up, kill-osd or down}
folder=$(realpath -m "${2:?DIR}")
export CEPH_CONF=$folder/ceph.conf

wait_for() { # SECONDS COMMAND…: until the command succeeds
    local tries=$(($1 * 5))
    shift
    until "$@" >/dev/null 2>&1; do
        ((tries-- > 0)) || { echo "in vain: $*" >&2; return 1; }
        sleep 0.2
    done
}
osd_is_up() { ceph osd stat -f json | grep -q '"num_up_osds":1'; }

case $command in
up)
    port=${3:-17000}
    mkdir "$folder"
    mkdir "$folder"/{mon,mgr,osd,run,log}
    fsid=$(cat /proc/sys/kernel/random/uuid)
    cat >"$CEPH_CONF" <<CONF
[global]
fsid = $fsid
mon host = v2:127.0.0.1:$port
public network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr1 = false
ms bind port min = $((port + 1))
ms bind port max = $((port + 19))
keyring = $folder/keyring
run dir = $folder/run
admin socket = $folder/run/\$name.asok
pid file = $folder/run/\$name.pid
log file = $folder/log/\$name.log
crash dir = $folder/log
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 1
mon max pg per osd = 1000
[mon]
mon data = $folder/mon
[mgr]
mgr data = $folder/mgr
mgr initial modules =
[osd]
osd data = $folder/osd
osd objectstore = bluestore
bluestore block size = 10737418240
osd memory target = 1073741824
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$((port + 20))
rgw override bucket index max shards = 1
CONF
    keys() { ceph-authtool "$folder/keyring" --gen-key "$@" >/dev/null; }
    ceph-authtool -C "$folder/keyring" >/dev/null
    keys -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    keys -n mon. --cap mon 'allow *'
    keys -n client.rgw --cap mon 'allow rwx' --cap osd 'allow rwx' --cap mgr 'allow rw'
    keys -n mgr.x --cap mon 'allow profile mgr' --cap osd 'allow *'
    keys -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' --cap mgr 'allow profile osd'
    monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$port]" "$folder/monmap" >/dev/null
    ceph-mon --mkfs -i a --monmap "$folder/monmap" --keyring "$folder/keyring"
    ceph-mon -i a >/dev/null 2>&1
    ceph-mgr -i x >/dev/null 2>&1
    osd=$(cat /proc/sys/kernel/random/uuid)
    ceph osd new "$osd" >/dev/null
    ceph-osd -i 0 --mkfs --osd-uuid "$osd" >"$folder/log/mkfs" 2>&1
    ceph-osd -i 0 >/dev/null 2>&1
    ceph osd crush add osd.0 1.0 root=default host=one >/dev/null 2>&1
    wait_for 60 osd_is_up
    radosgw -n client.rgw >"$folder/log/gateway" 2>&1
    wait_for 120 curl -s -o /dev/null "http://127.0.0.1:$((port + 20))/"
    radosgw-admin user create --uid=test --display-name=test --access-key=AKTEST --secret=SKTEST >/dev/null
    echo "export SNAPCORE_TEST_S3=http://127.0.0.1:$((port + 20)) AWS_ACCESS_KEY_ID=AKTEST AWS_SECRET_ACCESS_KEY=SKTEST"
    echo "export SNAPCORE_TEST_KILL_OSD='$(realpath "$0") kill-osd $folder'"
    ;;
kill-osd)
    kill -9 "$(cat "$folder/run/osd.0.pid")"
    wait_for 20 sh -c "! kill -0 $(cat "$folder/run/osd.0.pid")"
    sleep 2
    ceph-osd -i 0 >/dev/null 2>&1
    ;;
down)
    for signal in TERM KILL; do
        for file in "$folder"/run/*.pid; do
            [ -e "$file" ] && kill -$signal "$(cat "$file")" 2>/dev/null || true
        done
        sleep 2
    done
    ;;
*)
    echo "up, kill-osd or down" >&2
    exit 2
    ;;
esac
