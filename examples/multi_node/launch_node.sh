#!/usr/bin/env bash
# One node's part of a run over several nodes: `dspark train` with its options from the environment.
# Start it on each node, with the same arguments:
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
#   NCCL_SOCKET_IFNAME  network interface of NCCL, where it picks the wrong one of several
#   GLOO_SOCKET_IFNAME  the same for runs on CPUs; gloo else takes the address of the host name
#   OMP_NUM_THREADS     CPU threads of a rank; 1 otherwise
set -euo pipefail

: "${NODES:?must say how many nodes take part}"
: "${NODE_RANK:?must be 0 on the host that RENDEZVOUS names, another number elsewhere}"
: "${RENDEZVOUS:?must be host:port of one node, reachable from all}"

exec dspark train "$@" --nodes "$NODES" --node-rank "$NODE_RANK" --rendezvous "$RENDEZVOUS" \
  ${RANKS_PER_NODE:+--gpus "$RANKS_PER_NODE"} ${NODE_ADDRESS:+--node-address "$NODE_ADDRESS"}
