"""Train and export models/digits_cnn: a small residual CNN for scikit-learn's handwritten digits.

Writes model.onnx, calib.npz and eval.npz. The graph is exported by the TorchScript exporter
with its BatchNormalization nodes left in, so that a compiler has something to fold.

Needs torch, scikit-learn, onnx and onnxruntime: pip install '.[models]'
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from model_tools import (
    check_disjoint,
    drop_notes,
    fit,
    make_deterministic,
    parse_args,
    report,
    save_rows,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

OPSET = 13
EVAL_ROWS = 500
CALIB_ROWS = 200
SIDE = 16


def conv_bn(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Sequential:
    """Make a same-size convolution and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution when channels change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, 3)
        self.second = conv_bn(outputs, outputs, 3)
        self.shortcut = nn.Identity() if inputs == outputs else conv_bn(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, project, with ReLU6 and a shortcut round it all."""

    def __init__(self, channels: int, expanded: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(channels, expanded, 1),
            nn.ReLU6(),
            conv_bn(expanded, expanded, 3, groups=expanded),
            nn.ReLU6(),
            conv_bn(expanded, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


class DigitsCNN(nn.Module):
    """Stem, two kinds of residual block, a two-branch Concat, global pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 24, 3)
        self.inverted = InvertedResidual(24, 64)
        self.residual = ResidualBlock(24, 48)
        self.narrow = conv_bn(48, 32, 1)
        self.wide = conv_bn(48, 32, 3)
        self.last = ResidualBlock(64, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        x = F.max_pool2d(self.inverted(x), 2)
        x = self.residual(x)
        x = torch.cat([F.relu(self.narrow(x)), F.relu(self.wide(x))], dim=1)
        x = F.adaptive_avg_pool2d(self.last(x), 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits as [n, 1, 16, 16] floats in 0..1, and their labels."""
    digits = load_digits()
    small = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return images.numpy(), digits.target.astype(np.int64)


def random_shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move the whole batch by up to two pixels each way."""
    dx, dy = torch.randint(0, 5, (2,), generator=generator).tolist()
    return F.pad(images, (2, 2, 2, 2))[:, :, dy : dy + SIDE, dx : dx + SIDE]


def export(model: nn.Module, path: Path) -> None:
    """Export through TorchScript with a dynamic batch axis and BatchNorm unfolded."""
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, SIDE, SIDE),),
        path,
        dynamo=False,
        opset_version=OPSET,
        # In EVAL mode the exporter folds BatchNorm into the convolutions; PRESERVE leaves it.
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    drop_notes(path)


def main() -> None:
    args = parse_args(__doc__, "digits_cnn", epochs=30)
    make_deterministic(args.seed, args.threads)
    images, labels = load_images()
    rest, eval_images, rest_labels, eval_labels = train_test_split(
        images, labels, test_size=EVAL_ROWS, stratify=labels, random_state=args.seed
    )
    train, calib, train_labels, _ = train_test_split(
        rest, rest_labels, test_size=CALIB_ROWS, stratify=rest_labels, random_state=args.seed
    )
    check_disjoint({"image": eval_images}, {"image": train})
    model = DigitsCNN()
    fit(
        model,
        (torch.from_numpy(train),),
        torch.from_numpy(train_labels),
        epochs=args.epochs,
        batch_size=64,
        learning_rate=4e-3,
        weight_decay=1e-2,
        seed=args.seed,
        augment=random_shift,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    export(model, args.out / "model.onnx")
    save_rows(args.out / "calib.npz", {"image": calib})
    save_rows(args.out / "eval.npz", {"image": eval_images}, eval_labels)
    report(args.out)


if __name__ == "__main__":
    main()
