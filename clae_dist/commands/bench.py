"""`clae bench`."""

from __future__ import annotations

import argparse
import sys

from clae_dist.errors import ConfigError
from clae_dist.options import Parser

SUMMARY = (
    "measure loss, gather, step, data, checkpoints, restarts, start-up, linear probe, plans or GPU launches on this machine"
)
DESCRIPTION = """\
Measures this machine. All contenders are first checked to compute the same (loss and gradients against float64; steps bit for
bit), then timed in turns, so that a disturbance of the machine affects all of them. `pip install -e '.[bench]'` adds lightly's
and open_clip's losses.

  contrast   one rank's loss, forward and backward: 512 rows (both views) against 8,192 and 1,024 against 32,768, then 512
             against up to a million. Floor: four matrix products, rows x all rows x width, timed in turns with the rest.
  gather     the loss on 2 and 4 processes (under torchrun: on its ranks, your network): collectives, and the bytes that a
             rank sends by ring algorithms. Floor: its collectives alone, by latency alpha_s and beta_s_per_byte as measured.
  step       training steps (forward, attack, backward, optimiser) of plain SimCLR, of each cost of CLAE and, on the first
             encoder, of each method of the recipes. Floor: the time of plain SimCLR times the forward and backward units
             that the method predicts (flops_to_plain x 6 are those counted).
  data       from shards to views, by stage and in total, with processes and with threads, beside Pillow's and torchvision's
             SimCLR pipeline, plain WebDataset and, on a GPU, its JPEG decoder; how many cores a GPU needs. Floor: a JPEG's
             entropy decoding alone.
  checkpoint how long a save of 1 GB of state blocks training, beside torch.save and torch's async_save, and how long until
             it is committed. Floor: a copy of the same bytes. Written to the system's temporary folder. --bucket: and to a
             bucket of moto's S3 server on loopback, over a link of 20 ms and 100 MB/s, in turns.
  restart    from kill -9 of one of two ranks to the next new training step, by parts.
  start      time from `clae train` on one CPU rank to its first update, and peak memory of all of its processes, beside the
             same loop written with lightly.
  probe      the linear probe of `clae evaluate` beside scikit-learn's logistic regression, at one penalty and with the search.
  plan       steps and peak memory as `clae plan` predicts them from steps of other sizes, beside real ranks: 1, 2 and 4, three
             encoders, micro-batches, DDP and FSDP2 (under torchrun: on its ranks). Errors are relative to what was measured.
             communication_s is the step less that of a rank alone. The CPU alone.
  gpu-counts kernels, collectives, bytes and host waits of a training step on a GPU, counted by dispatch, so that no GPU is
             needed; on one, also the launches that torch's profiler sees. Rows: name, value, unit, limit (the most that it
             should be), how. Exit code 0 also above a limit.

Each row of the others: case; what ("name: description"); median_s; spread (interquartile range over median); ratio_to: {name:
this median over that of another row of the case}; floor_s; added_bytes (peak memory of one call above the level before) or
wire_bytes, and bytes_ratio_to, the same of these; more: further figures, of which cpu_s, seconds of all cores in the best
repeat, is the least affected by other processes. OMP_NUM_THREADS sets torch's threads. Progress is printed to stderr.
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "bench",
        choices=("contrast", "step", "gather", "data", "checkpoint", "restart", "start", "probe", "plan", "gpu-counts"),
        help="what to measure",
    )
    parser.add_argument(
        "shards", metavar="SHARDS", nargs="?", default="", help="data: a set as in data.shards (default: synthetic images)"
    )
    parser.add_argument("--split", default="", help="data: split of the set (default: train)")
    parser.add_argument(
        "--images-per-s", type=float, default=0.0, metavar="RATE", help="data: print the cores needed by a GPU of this rate"
    )
    parser.add_argument("--bucket", action="store_true", help="checkpoint: also a run folder on object storage (needs moto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: versions, machine, notes, rows")
    parser.add_argument("--quick", action="store_true", help="only small sizes and few repeats: about a minute")


def run(arguments: argparse.Namespace) -> int:
    data_options = {"SHARDS": arguments.shards, "--images-per-s": arguments.images_per_s, "--split": arguments.split}
    for option, value in data_options.items():
        if value and arguments.bench != "data":
            raise ConfigError(
                f"{option} is {value}, which `clae bench {arguments.bench}` does not use; only `clae bench data` does."
            )
    if arguments.bucket and arguments.bench != "checkpoint":
        raise ConfigError(f"--bucket is for `clae bench checkpoint`, not for `clae bench {arguments.bench}`; omit it.")
    from clae_dist.bench import run_bench

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    more: dict[str, object] = {}
    if arguments.bench == "data":
        more = {"shards": arguments.shards, "rate": arguments.images_per_s, "split": arguments.split or "train"}
    if arguments.bucket:
        more = {"bucket": True}
    module = arguments.bench.replace("-", "_")
    return run_bench(module, quick=arguments.quick, as_json=arguments.json, progress=progress, **more)
