#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Start a SLURM cluster, train on it, and stop it. Its two nodes are two sets of namespaces of this machine
# (network, host name, mounts), joined by a virtual cable alone: they share no memory. Needs root, and SLURM and
# munge, which Debian has as slurm-wlm and munge. The status is 0 if all passed.
#
#   sudo env PYTHON=.venv/bin/python bash tests/cluster/slurm.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-.venv/bin/python} PYTHONPATH=$PWD

dir=$(mktemp -d)
# shellcheck disable=SC2046,SC2317  # one word per job; called by the trap
clean_up() {
    kill -KILL $(jobs -p) && wait
    sleep 1 # the kernel ends the processes in the namespaces
    rm -r "$dir"
    true
} 2>/dev/null
trap clean_up EXIT
trap 'exit 1' HUP INT TERM
# A node is a sleeping process in namespaces of its own. Its end (--kill-child) ends all processes in them.
printf '127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n' >"$dir/hosts"
nodes=()
for node in node1 node2; do
    unshare --net --uts --mount --pid --fork --mount-proc --kill-child sh -euc \
        "hostname $node; mount --bind '$dir/hosts' /etc/hosts; mount -t tmpfs none /dev/shm
        touch '$dir/$node'; exec sleep infinity" &
    nodes+=($!)
    for _ in {1..100}; do [[ ! -e $dir/$node ]] || break; sleep 0.1; done
    [[ -e $dir/$node ]] # without the node its commands would change this machine
done
on() { # node, command
    local of=/proc/${nodes[$1 - 1]}/ns
    nsenter --net="$of/net" --uts="$of/uts" --mount="$of/mnt" --pid="$of/pid_for_children" --wd="$PWD" "${@:2}"
}
ip link add cable netns "${nodes[0]}" type veth peer name cable netns "${nodes[1]}"
for node in 1 2; do
    on $node ip addr add 10.77.0.$node/24 dev cable
    on $node ip link set cable up
    on $node ip link set lo up
done
export SLURM_CONF=$dir/slurm.conf
sed "s|@DIR@|$dir|" tests/cluster/slurm.conf.in >"$SLURM_CONF"
head -c 128 /dev/urandom >"$dir/munge.key"
chmod 400 "$dir/munge.key"
chmod 711 "$dir"
munged --foreground --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munged.pid" --seed-file="$dir/munged.seed" --log-file="$dir/munged.log" 2>/dev/null &
mkdir "$dir/state" "$dir/spool.node1" "$dir/spool.node2"
on 1 slurmctld
on 1 slurmd
on 2 slurmd
for _ in {1..30}; do
    [[ $(on 1 sinfo --noheader --states=idle --format=%D 2>/dev/null) != 2 ]] || break
    sleep 1
done
on 1 sinfo

failed=0
check() { # what, status, output
    echo "--- $1: status $2"
    cat "$3"
    if (($2)) || ! tail -n 1 "$3" | grep -qE '^test accuracy .* \| 2 ranks \| cpu$'; then
        echo "--- $1: failed"
        failed=1
    fi
}

# Small batches, so that an epoch takes seconds. The network is that of the output in docs/training.md.
train=(examples/train_ddp.py --device cpu --batch-size 32 --lr 0.02)
train+=(--hidden 320 --activation relu --label-smoothing 0.1)
job=(--nodes=2 --cpus-per-task=1 examples/cluster/slurm.sbatch "${train[@]}")
status=0
on 1 timeout 120 sbatch --wait --output="$dir/torchrun" "${job[@]}" --dry-run || status=$?
check "a torchrun per node" $status "$dir/torchrun"

# SIGUSR1 to the batch shell: SLURM sends it before the time limit (--signal).
status=0
on 1 timeout 300 sbatch --wait --output="$dir/requeued" "${job[@]}" --epochs 3 --checkpoint "$dir/run" &
submitted=$!
for _ in {1..60}; do ! grep -q '^epoch 1' "$dir/requeued" 2>/dev/null || break; sleep 1; done
id=$(on 1 squeue --noheader --format=%A)
on 1 scancel --batch --signal=USR1 "$id"
wait $submitted || status=$?
check "stopped and queued again" $status "$dir/requeued"
on 1 scontrol show job "$id" | grep -o 'Restarts=.*' | tee "$dir/restarts"
grep -q 'Restarts=1 ' "$dir/restarts" || failed=1

((failed)) && echo "slurm.sh: failed" || echo "slurm.sh: passed"
exit $failed
