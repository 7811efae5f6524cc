#!/usr/bin/env bash
# One node's part of a run over several nodes. Start it on each, with the same arguments:
#
#   NODES=2 NODE_RANK=0 RENDEZVOUS=host0:29400 examples/multi_node/launch_node.sh --config run.yaml
#   NODES=2 NODE_RANK=1 RENDEZVOUS=host0:29400 examples/multi_node/launch_node.sh --config run.yaml
#
# SIGTERM or Ctrl-C on any one node ends the step on all, saves, and all exit with 0.
# How the run stands is then in OUTPUT_DIR/run_status: completed, stopped or (it failed) running.
#
# Must be set:
#   NODES               how many nodes take part
#   NODE_RANK           0 on the host that RENDEZVOUS names: it serves the rendezvous
#   RENDEZVOUS          host:port that all nodes reach
# May be set:
#   NODE_ADDRESS        name or address of this node for the others, where its host name is none
#   RANKS_PER_NODE      ranks of a node; default: one for each GPU
#   RUN_ID              tells apart runs that share a rendezvous port
#   NCCL_SOCKET_IFNAME  network interface of NCCL, where it picks the wrong one of several
#   GLOO_SOCKET_IFNAME  the same for runs on CPUs; gloo else takes the address of the host name
#   OMP_NUM_THREADS     CPU threads of a rank; torchrun sets 1 otherwise
set -euo pipefail

: "${NODES:?must say how many nodes take part}"
: "${NODE_RANK:?must be 0 on the host that RENDEZVOUS names, another number elsewhere}"
: "${RENDEZVOUS:?must be host:port of one node, reachable from all}"

export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"  # a failing NCCL says why

options=(
  --nnodes "$NODES"
  --nproc-per-node "${RANKS_PER_NODE:-gpu}"
  --rdzv-backend c10d
  --rdzv-endpoint "$RENDEZVOUS"
  --rdzv-id "${RUN_ID:-dspark}"
  --rdzv-conf "is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)"
)
if [ -n "${NODE_ADDRESS:-}" ]; then
  options+=(--local-addr "$NODE_ADDRESS")
fi

# Until all nodes are there torchrun says nothing.
echo "node $NODE_RANK of $NODES waits at $RENDEZVOUS for the others, for at most 10 minutes" >&2

# A signal goes to the ranks, not to torchrun, which would kill them after 30 seconds, leave the
# other nodes' torchrun waiting for 5 minutes and exit with 1. In a session of its own it gets none
# that is meant for a whole process group. Without ranks yet there is nothing to save.
setsid torchrun "${options[@]}" -m dspark_megatron.train "$@" &
torchrun=$!

signalled=
stop() {
  interrupted=1
  if [ -z "$signalled" ]; then
    signalled=1
    pkill -TERM -P "$torchrun" || kill -TERM "$torchrun" || true
  fi
}
trap stop TERM INT

interrupted=1
while [ -n "$interrupted" ]; do # a trap ends `wait` early
  interrupted=
  wait "$torchrun" && code=0 || code=$?
done
exit "$code"
