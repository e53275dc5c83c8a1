#!/usr/bin/env bash
# What srun starts on each node: torchrun, which starts and watches the ranks there.
#
#   node_entry.sh VERB ARGS...        arguments of megatron-v2pe
#
# Reads SLURM_NNODES, SLURM_NODEID, SLURM_JOB_ID (from srun) and MASTER_ADDR, MASTER_PORT, V2PE_RANKS_PER_NODE,
# V2PE_MAX_RESTARTS (from the job script). Ranks that die are started again, all of them, from the newest checkpoint.
set -eu
project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# In a clone, the package need not be installed; in an installed package this folder is inside of it.
[ ! -d "$project/megatron_v2pe" ] || export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"
# Checking the nodes twice finds nothing new; a run that fails is worth another start.
[ "$1" = preflight ] && V2PE_MAX_RESTARTS=0
# `scancel --signal=USR1` reaches every process of the step; ranks save and end, torchrun would just die of it.
trap '' USR1
# A store of its own for every start of the ranks. The one that torchrun would share keeps the addresses of dead ranks,
# and after a restart in which nodes trade places some of them look into the wrong store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A c10d rendezvous, so that a node that lost a rank waits for the others; its id differs for every start of the job.
exec "${V2PE_PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" \
    --node-rank "$SLURM_NODEID" \
    --nproc-per-node "$V2PE_RANKS_PER_NODE" \
    --max-restarts "$V2PE_MAX_RESTARTS" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m megatron_v2pe "$@"
