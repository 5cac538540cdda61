r"""LightSKD's own experiment: CIFAR-100 images, a baseline against DRG, DSR and both, from the same initial weights.

    python -m benchmarks.lightskd_images ../shared/data/cifar100_train20k.npz \
        -o benchmarks/results/lightskd_images.json

On a GPU a ResNet18 with a 3 x 3 stem, else a ResNet-8 (16, 32, 64 channels). The last 2,000 images are for validation.
Runs already in the results file are not repeated, so that a stopped experiment goes on. Not a test of speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xrdfast.distillation import DRGLoss, DSRLoss, SelfDistillation

VARIANTS: dict[str, tuple[bool, bool]] = {  # DRG, DSR
    "baseline": (False, False),
    "drg": (True, False),
    "dsr": (False, True),
    "both": (True, True),
}
N_VALIDATION = 2000
MEAN, DEVIATION = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of CIFAR-100's training images
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # the default scale of torchvision's RandomResizedCrop


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al., CVPR 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, in_channels, h, w) to (n, out_channels, h / stride, w / stride)."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """For 32 x 32 images: 3 x 3 stem, stages of basic blocks, the mean over positions, one linear map."""

    def __init__(self, widths: tuple[int, ...], blocks: int, n_classes: int = 100) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        stages, channels = [], widths[0]
        for i, width in enumerate(widths):
            layers = [BasicBlock(channels, width, 1 if i == 0 else 2)]
            layers += [BasicBlock(width, width, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*layers))
            channels = width
        self.stages = nn.ModuleList(stages)
        self.linear = nn.Linear(channels, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (n, 3, 32, 32)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.linear(x.mean(dim=(2, 3)))


def recipe(device: torch.device, long: bool) -> tuple[Callable[[], nn.Module], int, tuple[int, ...]]:
    """Model, epochs, and the epochs at which the rate falls tenfold."""
    if device.type == "cuda":
        build = lambda: ResNet((64, 128, 256, 512), blocks=2)  # noqa: E731
        return (build, 200, (60, 120, 160)) if long else (build, 60, (18, 36, 48))
    return lambda: ResNet((16, 32, 64), blocks=1), 30, (15, 22, 27)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random resized crops to 32 x 32, flipped half of the time; (n, 3, 32, 32) in and out."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    area, ratio = uniform(*CROP_AREA), uniform(*(math.log(r) for r in CROP_RATIO)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = width * flip, height
    affine[:, 0, 2] = (1.0 - width) * uniform(-1.0, 1.0)
    affine[:, 1, 2] = (1.0 - height) * uniform(-1.0, 1.0)
    grid = F.affine_grid(affine.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled indices; the last short batch is dropped."""
    order = torch.randperm(n, generator=generator)
    yield from order[: n // size * size].split(size)


def train(
    data: dict[str, Tensor],
    variant: str,
    seed: int,
    device: torch.device,
    *,
    long: bool,
    epochs: int | None = None,
) -> dict[str, Any]:
    """One run: top-1 and top-5 on the validation images after the last epoch, and seconds."""
    build, n_epochs, milestones = recipe(device, long)
    n_epochs = epochs or n_epochs
    torch.manual_seed(seed)
    model = build().to(device, memory_format=torch.channels_last).train()
    drg, dsr = VARIANTS[variant]
    wrapped = None
    if drg or dsr:
        wrapped = SelfDistillation(
            model,
            example=data["image"][:2],
            stage="stages.1",
            drg=DRGLoss() if drg else None,
            dsr=DSRLoss() if dsr else None,
        )
    trained = wrapped if wrapped is not None else model
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones))
    generator = torch.Generator().manual_seed(seed)
    images, labels = data["image"][:-N_VALIDATION], data["label"][:-N_VALIDATION]
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    began = time.monotonic()
    for _ in range(n_epochs):
        if wrapped is not None:
            wrapped.new_epoch()
        for rows in batches(len(images), 128, generator):
            rows = rows.to(device)
            x = augmented(images[rows], generator)
            with autocast:
                logits = trained(x)
                loss = (
                    wrapped.loss(logits, labels[rows])
                    if wrapped is not None
                    else F.cross_entropy(logits, labels[rows])
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
    seconds = time.monotonic() - began
    model.eval()
    held_out, truth = data["image"][-N_VALIDATION:], data["label"][-N_VALIDATION:]
    with torch.inference_mode(), autocast:
        ranked = torch.cat([model(x).topk(5, dim=1).indices for x in held_out.split(500)])
    hits = ranked == truth[:, None]
    return {
        "top1": 100.0 * float(hits[:, 0].double().mean()),
        "top5": 100.0 * float(hits.any(dim=1).double().mean()),
        "seconds": seconds,
        "epochs": n_epochs,
    }


def read(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Normalised images (20000, 3, 32, 32) and labels."""
    with np.load(path, allow_pickle=False) as file:
        image, label = file["image"], file["fine_label"]
    scaled = (
        torch.from_numpy(image).to(device).permute(0, 3, 1, 2).float() / 255.0
    )  # channels last, as they lie
    mean, deviation = (torch.tensor(x, device=device)[:, None, None] for x in (MEAN, DEVIATION))
    return {"image": (scaled - mean) / deviation, "label": torch.from_numpy(label).long().to(device)}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Means over seeds, and the paired difference from the baseline with its standard error.

    Args:
        runs: of one recipe, by "variant/seed/recipe".
    """
    lines = ["| variant | seeds | top-1 | top-5 | top-1 above the baseline |", "|---|---|---|---|---|"]
    by_variant = {
        variant: {key.split("/")[1]: run for key, run in runs.items() if key.split("/")[0] == variant}
        for variant in VARIANTS
    }
    for variant, seeds in by_variant.items():
        if not seeds:
            continue
        pairs = [
            run["top1"] - by_variant["baseline"][s]["top1"]
            for s, run in seeds.items()
            if s in by_variant["baseline"]
        ]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        gain = "" if variant == "baseline" or not pairs else f"{statistics.mean(pairs):+.2f} ± {error:.2f}"
        means = [statistics.mean(run[key] for run in seeds.values()) for key in ("top1", "top5")]
        lines.append(f"| {variant} | {len(seeds)} | {means[0]:.2f} | {means[1]:.2f} | {gain} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is not in the results file yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="JSON of all runs; continued where it exists"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--long", action="store_true", help="the 200-epoch recipe, on a GPU")
    parser.add_argument("--epochs", type=int, help="fewer, to try it out")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = read(arguments.images, device)
    runs = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    own = f"{device.type}-{arguments.epochs or recipe(device, arguments.long)[1]}"  # runs of another are no pairs
    for seed in range(arguments.seeds):
        for variant in arguments.variants:
            key = f"{variant}/{seed}/{own}"
            if key in runs:
                continue
            runs[key] = train(data, variant, seed, device, long=arguments.long, epochs=arguments.epochs)
            arguments.output.write_text(json.dumps(runs, indent=1) + "\n")
            print(f"{key}: top-1 {runs[key]['top1']:.2f}, {runs[key]['seconds']:.0f} s", flush=True)
    print(table({key: run for key, run in runs.items() if key.endswith(f"/{own}")}))


if __name__ == "__main__":
    main()
