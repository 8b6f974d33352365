"""How often the monitor's tests find nothing where there is nothing, and something where there is: the tables of the record.

    python -m tests.monitoring.power RUN SHARDS FOREIGN

RUN is an encoder, SHARDS its test images, FOREIGN a folder of images of another kind. Images are corrupted in their own size
and then go through `embed` as all others do: what skips the encoder's own preprocessing differs by that alone.

# N images, F width of the features
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clae_dist.data.images import open_dataset
from clae_dist.deploy.embedding import embed
from clae_dist.deploy.encoder import Encoder, load_encoder
from clae_dist.evaluation.corruption_kinds import SEVERITIES, corrupt
from clae_dist.monitoring.two_sample import (
    Finding,
    classifier_test,
    components_test,
    distance_test,
    distances,
    median_distance,
    mmd_test,
)

TESTS = ("mmd", "classifier", "components", "distance")
KINDS = ("gaussian_noise", "defocus_blur", "contrast")
WINDOW = 300
_PERMUTATIONS = 200


@dataclass(frozen=True)
class Reference:
    """Rows that windows are compared with; one half fits components and is the bank of neighbours, as in `Monitor`."""

    rows_NF: torch.Tensor  # noqa: N815 - dimensions

    def findings(self, window_MF: torch.Tensor, seed: int) -> list[Finding]:
        """Of each of TESTS."""
        generator = torch.Generator().manual_seed(seed)
        bank, held = self.rows_NF[::2], self.rows_NF[1::2]
        return [
            mmd_test(self.rows_NF, window_MF, median_distance(self.rows_NF[:500]), _PERMUTATIONS, generator),
            classifier_test(self.rows_NF, window_MF, generator),
            components_test(bank, held, window_MF),
            distance_test(distances(bank, held), distances(bank, window_MF)),
        ]


def false_alarms(features_NF: torch.Tensor, draws: int, size: int = 1000, alpha: float = 0.05) -> dict[str, int]:
    """Windows of the same images as the reference that each test finds different, of `draws`, each with a new reference."""
    found = dict.fromkeys(TESTS, 0)
    for seed in range(draws):
        order = torch.randperm(len(features_NF), generator=torch.Generator().manual_seed(seed))
        reference = Reference(features_NF[order[:size]])
        for name, one in zip(TESTS, reference.findings(features_NF[order[size : size + WINDOW]], seed), strict=True):
            found[name] += one.p < alpha
    return found


def power(reference: Reference, windows: list[torch.Tensor], alpha: float = 0.01) -> dict[str, float]:
    """The share of the windows that each test finds different."""
    found = [reference.findings(window, seed) for seed, window in enumerate(windows)]
    return {name: sum(one[i].p < alpha for one in found) / len(windows) for i, name in enumerate(TESTS)}


@dataclass(frozen=True)
class Pool:
    """Images that windows are drawn from, beside the reference: uint8 (N, 3, H, W), labels and features."""

    images: torch.Tensor
    labels: np.ndarray
    features: torch.Tensor
    foreign: torch.Tensor  # features of images of another kind

    def windows(self, draws: int, rows: np.ndarray | None = None, features: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Windows of the pool, or of some rows of it, with these features of theirs."""
        rows = np.arange(len(self.images)) if rows is None else rows
        chosen = self.features if features is None else features
        return [chosen[np.random.default_rng(seed).choice(rows, WINDOW, replace=False)] for seed in range(draws)]

    def mixed(self, draws: int, share: float, more: torch.Tensor) -> list[torch.Tensor]:
        """Windows in which a share of the rows is drawn from `more`."""
        count = round(share * WINDOW)
        return [
            torch.cat([window[count:], more[np.random.default_rng(seed).choice(len(more), count, replace=False)]])
            for seed, window in enumerate(self.windows(draws))
        ]


def features(images_N3HW: torch.Tensor, encoder: Encoder) -> torch.Tensor:
    """(N, F), through the preprocessing that all images have."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images_N3HW]
    return torch.from_numpy(embed(pictures, encoder, num_workers=0))


def curves(reference: Reference, pool: Pool, encoder: Encoder, draws: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Name and power of each point."""
    yield "the same images", power(reference, pool.windows(draws))
    for kind in KINDS:
        for severity in SEVERITIES:
            changed = features(corrupt(pool.images, kind, severity, np.arange(len(pool.images))), encoder)
            yield f"{kind} {severity}", power(reference, pool.windows(draws, features=changed))
    first = pool.features[pool.labels == pool.labels.min()]
    rest = np.flatnonzero(pool.labels != pool.labels.min())
    for times in (2, 3, 5):
        share = times / (1 + pool.labels.max())
        alone = Pool(pool.images[rest], pool.labels[rest], pool.features[rest], pool.foreign)
        yield f"one class {times} times", power(reference, alone.mixed(draws, share, first))
    yield "one class is missing", power(reference, pool.windows(draws, rest))
    for share in (0.01, 0.05, 0.1, 0.2):
        yield f"{share:.0%} foreign", power(reference, pool.mixed(draws, share, pool.foreign))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("shards")
    parser.add_argument("foreign")
    parser.add_argument("--draws", type=int, default=20, help="windows a point")
    parser.add_argument("--false", type=int, default=300, help="windows of the reference's own images")
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.shards, "test")
    read = [dataset.read(i) for i in range(len(dataset))]
    images, labels = torch.stack([image for image, _ in read]), np.array([label for _, label in read])
    encoder = load_encoder(arguments.encoder)
    embedded = features(images, encoder)
    if arguments.false:
        print(f"false alarms at 5 % of {arguments.false}: {false_alarms(embedded, arguments.false)}", flush=True)
    order = np.random.default_rng(0).permutation(len(images))
    foreign = torch.from_numpy(embed(arguments.foreign, encoder, num_workers=0))
    rows = order[2000:4000]
    pool = Pool(images[rows], labels[rows], embedded[rows], foreign)
    print(f"| {WINDOW} images | {' | '.join(TESTS)} |\n|---|{'---|' * len(TESTS)}")
    for name, found in curves(Reference(embedded[order[:2000]]), pool, encoder, arguments.draws):
        print(f"| {name} | {' | '.join(f'{found[test]:.2f}' for test in TESTS)} |", flush=True)


if __name__ == "__main__":
    main()
