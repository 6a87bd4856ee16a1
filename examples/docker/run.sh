#!/usr/bin/env bash
# One node of a server in a container; the same command for one machine and for many.
#
# Needs:   Docker with the NVIDIA container toolkit, and the image of ./Dockerfile.
# Prints:  what one-node-8gpu.sh or four-nodes-8gpu-tp32.sh print.
# Hangs:   as those; inside the container: docker exec w4afp8 sglang-w4afp8 doctor.
#
# Usage:   docker/run.sh MODEL_FOLDER launch-option ...
#          docker/run.sh /models/R1-W4AFP8 --tp 8
#          docker/run.sh /models/R1-W4AFP8 --tp 32 --nnodes 4 --master 10.0.0.1 --node-rank 2
set -euo pipefail
model=${1:?usage: docker/run.sh MODEL_FOLDER --tp N [launch option ...]}
docker=${DOCKER:-docker}

options=(
    --name w4afp8 --rm --init
    --gpus all
    --network host             # NCCL and gloo see the machine's interfaces and addresses
    --shm-size 32g             # ranks of a node talk through /dev/shm; the default is 64 MB
    --ulimit memlock=-1        # RDMA locks its buffers
    --ulimit nofile=1048576
    --cap-add IPC_LOCK
    --volume "$model:$model:ro"
    # The home of the image's user: compiled kernels, SGLang's too, survive the container.
    --volume w4afp8-cache:/root/.cache
    --env SGLANG_W4AFP8_STRICT=1
)
if [[ -d /dev/infiniband ]]; then
    options+=(--device /dev/infiniband)
fi
exec "$docker" run "${options[@]}" "${IMAGE:-sglang-w4afp8}" \
    sglang-w4afp8 launch "$model" --run "${@:2}"
