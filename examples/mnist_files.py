"""An MNIST-style CNN on image files in MNIST's own format (IDX).

python examples/mnist_files.py                     # writes the built-in digits as 28x28 MNIST files first
python examples/mnist_files.py FOLDER              # FOLDER/MNIST/raw/train-images-idx3-ubyte and the other three
torchrun --nproc-per-node 2 examples/mnist_files.py FOLDER
"""

import struct
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import hvdtrain
from hvdtrain.data.digits import digits
from hvdtrain.data.named import load_data
from hvdtrain.settings.options import Component
from hvdtrain.training.models import cnn


def write_idx(file: Path, values: Tensor) -> None:
    header = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)  # 8: unsigned bytes
    file.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def write_digits(folder: Path) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, train in (("train", True), ("t10k", False)):
        images, labels = digits(train).tensors
        write_idx(
            raw / f"{part}-images-idx3-ubyte", (interpolate(images, size=28, mode="bilinear")[:, 0] * 255).round()
        )
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    with hvdtrain.init() as backend:
        data = load_data(Component("mnist"), folder=folder, download=False, timeout_s=60)
        model = cnn(channels=data.shape[0], size=data.shape[-1], classes=data.classes, width=8).to(backend.device)
        trainer = hvdtrain.Trainer(backend, model, torch.optim.AdamW(model.parameters(), lr=5e-3), loss=cross_entropy)
        result = trainer.fit(data.train, data.evaluation, epochs=4, global_batch_size=60)
        if backend.rank == 0:
            print(f"{backend.world_size} rank(s): accuracy {result.eval_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            write_digits(Path(temporary))
            main(Path(temporary))
