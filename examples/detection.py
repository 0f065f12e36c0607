"""Object detection with torchvision's Faster R-CNN: images with different numbers of boxes, losses that the model computes.

python examples/detection.py
torchrun --nproc-per-node 2 examples/detection.py
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import box_iou

import hvdtrain


class Rectangles(Dataset):
    """Dark images with one to three bright rectangles."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(self.seed * self.images + index)
        image = 0.2 * torch.rand(3, 96, 96, generator=draw)
        boxes = []
        for _ in range(1 + index % 3):
            x, y = torch.randint(0, 60, (2,), generator=draw).tolist()
            width, height = torch.randint(16, 36, (2,), generator=draw).tolist()
            image[:, y : y + height, x : x + width] = 1
            boxes.append([x, y, x + width, y + height])
        labels = torch.ones(len(boxes), dtype=torch.int64)
        return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": labels}


class Detection:
    def collate(self, samples: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.stack(list(model(*batch).values())).sum()

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        images, targets = batch
        overlaps = []
        for found, target in zip(model(images), targets, strict=True):
            nothing = torch.zeros(len(target["boxes"]), 1, device=images[0].device)  # is found to overlap
            overlaps.append(torch.cat([nothing, box_iou(target["boxes"], found["boxes"])], dim=1).max(dim=1).values)
        overlap = torch.cat(overlaps)
        for part in (model, model.rpn, model.roi_heads):  # torchvision computes losses in training mode alone
            part.training = True
        loss = self.loss(model, batch)
        model.eval()
        return {"loss": loss, "overlap": (overlap.mean(), len(overlap))}  # a mean over boxes, not over images


def main() -> None:
    torch.manual_seed(0)
    sizes = {"num_classes": 2, "min_size": 96, "max_size": 96}
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, **sizes)
    with hvdtrain.init() as backend:
        model.to(backend.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        trainer = hvdtrain.Trainer(backend, model, optimizer, task=Detection(), clip_norm=10.0)
        result = trainer.fit(
            Rectangles(64, seed=0), Rectangles(9, seed=1), epochs=4, global_batch_size=8, eval_batch_size=3
        )
        if backend.rank == 0:
            shown = {name: round(value, 4) for name, value in result.eval_metrics.items()}
            print(f"{backend.world_size} rank(s): train loss {result.train_loss:.4f}, {shown}")


if __name__ == "__main__":
    main()
