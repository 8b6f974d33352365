"""A component for TorchX, which submits to Slurm, Kubernetes, AWS Batch and others:

torchx run -s kubernetes -cfg queue=default launch/torchx_component.py:train --image REGISTRY/clae --hosts 2 --gpus 8 \
  --config configs/imagenet/clae.yaml --shards s3://bucket/imagenet --run_dir s3://bucket/runs/first

The image is that of launch/Containerfile. Every host runs launch/torchrun.sh.
"""

import shlex

import torchx.specs as specs
from torchx.specs import macros


def train(
    image: str,
    config: str,
    shards: str,
    run_dir: str,
    hosts: int = 1,
    gpus: int = 8,
    cpus: int = 64,
    memory_gib: int = 512,
    max_retries: int = 3,
    settings: str = "",
) -> specs.AppDef:
    """Pretrain an encoder on some hosts.

    Args:
        image: the container image
        config: the recipe, a path in the checkout of the image
        shards: data.shards, which every host sees
        run_dir: the run folder, on storage that all hosts share or s3://
        hosts: the number of hosts
        gpus: ranks on each host, one per GPU
        cpus: cores of each host
        memory_gib: memory of each host
        max_retries: how often the scheduler starts all hosts again; the run resumes
        settings: further key=value settings
    """
    words = [config, f"data.shards={shards}", f"run_dir={run_dir}", *shlex.split(settings)]
    # On the first host, schedulers leave the variable that the macro names at "localhost", which other hosts cannot reach.
    command = (
        f'head="$${{{macros.rank0_env}:=localhost}}"; [ "$head" != localhost ] || head=$(hostname -i | cut -d " " -f 1); '
        f'exec ./launch/torchrun.sh --nodes {hosts} --gpus-per-node {gpus} --head "$head:29500" {shlex.join(words)}'
    )
    role = specs.Role(
        name="clae",
        image=image,
        entrypoint="bash",
        args=["-c", command],
        num_replicas=hosts,
        max_retries=max_retries,
        retry_policy=specs.RetryPolicy.APPLICATION,
        resource=specs.resource(cpu=cpus, gpu=gpus, memMB=memory_gib * 1024),
    )
    return specs.AppDef(name="clae", roles=[role])
