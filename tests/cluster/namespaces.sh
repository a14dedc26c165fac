#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Train in two network namespaces of this machine, joined by a virtual cable alone. Needs root. The status is
# 0 if the training passed, 1 if it failed, 77 if it could not be tried.
#
#   sudo env PYTHON=.venv/bin/python bash tests/cluster/namespaces.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD

left=torchpar-$$-left right=torchpar-$$-right
logs=$(mktemp -d)
# shellcheck disable=SC2046,SC2317  # one word per job; called by the trap
clean_up() {
    rm -r "$logs"
    kill $(jobs -p) && wait
    ip netns del "$left" && ip netns del "$right"
    true
} 2>/dev/null
trap clean_up EXIT
trap 'exit 1' HUP INT TERM

if ! ip netns add "$left" 2>/dev/null; then
    echo "namespaces.sh: not run, only root (with CAP_SYS_ADMIN) can make network namespaces" >&2
    exit 77
fi
ip netns add "$right"
ip link add cable netns "$left" type veth peer name cable netns "$right"
ip -n "$left" addr add 10.77.0.1/30 dev cable
ip -n "$right" addr add 10.77.0.2/30 dev cable
for node in "$left" "$right"; do
    ip -n "$node" link set lo up
    ip -n "$node" link set cable up
done

# Both nodes have this machine's host name, which leads each of them to itself. So each of these three replaces
# a host name; without any one of them the run hangs, or ends with "connection refused":
#   is_host             otherwise torchrun compares host names to find the agent that hosts the rendezvous
#   --local_addr        otherwise rank 0's agent tells the others rank 0's host name
#   GLOO_SOCKET_IFNAME  otherwise gloo accepts its peers at the address of the host name
# Nodes do not share memory either.
agent() { # node, address, is_host
    exec ip netns exec "$1" unshare --mount sh -c 'mount -t tmpfs none /dev/shm && exec "$@"' sh env GLOO_SOCKET_IFNAME=cable timeout -k 40 120 "$python" -m torch.distributed.run \
        --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=10.77.0.1:29400 \
        --rdzv_conf=is_host="$3" --local_addr="$2" \
        examples/train_ddp.py --dry-run --device cpu --hidden 128 64 --crop 0 --pool 1
}
(agent "$left" 10.77.0.1 1) >"$logs/left" 2>&1 &
(agent "$right" 10.77.0.2 0) >"$logs/right" 2>&1 &
failed=0
wait %1 || failed=1
wait %2 || failed=1
cat "$logs/left" "$logs/right"

# Either agent may get rank 0. Its last line is the summary.
grep -qhE '^test accuracy .* \| 2 ranks \| cpu$' <(tail -qn 1 "$logs/left" "$logs/right") || failed=1
# Each of the ten steps sends a gradient of 109,386 float32 parameters in either direction.
for direction in rx tx; do
    bytes=$(ip netns exec "$left" cat /sys/class/net/cable/statistics/${direction}_bytes)
    echo "left ${direction}: $bytes bytes over the cable"
    ((bytes >= 10 * 109386 * 4)) || failed=1
done
((failed)) && echo "namespaces.sh: failed" || echo "namespaces.sh: passed"
exit $failed
