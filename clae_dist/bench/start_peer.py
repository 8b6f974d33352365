"""The peer in `clae bench start`: SimCLR as users of lightly write it, without imports of this package.

Run as a script: FOLDER STEPS_FILE IMAGE_SIZE BATCH WORKERS STEPS. After each update, a line is added to STEPS_FILE.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(images: str, steps_file: str, image_size: int, batch: int, workers: int, steps: int) -> None:
    import torch
    import torchvision
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from torch import nn

    encoder = torchvision.models.resnet18()
    encoder.fc = nn.Identity()
    model = nn.Sequential(encoder, SimCLRProjectionHead(512, 512, 128))
    data = LightlyDataset(images, transform=SimCLRTransform(input_size=image_size))
    loader = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers)
    criterion = NTXentLoss(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step, ((first, second), *_) in enumerate(loader, start=1):
        loss = criterion(model(first), model(second))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with Path(steps_file).open("a") as file:
            file.write(f"{step}\n")
        if step == steps:
            break
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{steps_file}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
