"""A small classifier whose features measure image quality where Inception's would need a download."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minidistill import _validate, training


class FeatureClassifier(nn.Module):
    """Logits (n, classes) from images (n, *shape); `features` gives the last hidden layer, (n, 32)."""

    def __init__(self, shape: tuple[int, ...], n_classes: int, hidden: int = 128, features: int = 32) -> None:
        super().__init__()
        pixels = int(torch.Size(shape).numel())
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, features), nn.ReLU()
        )
        self.head = nn.Linear(features, n_classes)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    @torch.no_grad()
    def recognised(self, x: Tensor, label: Tensor) -> float:
        """The fraction of images classified as their label."""
        return float((self(x).argmax(1) == label).double().mean())


def train_classifier(
    images: Tensor, labels: Tensor, *, steps: int = 1500, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> FeatureClassifier:
    """Fit on images (n, *shape) and labels (n,) with a little noise for augmentation; about a second for the digits."""
    _validate.samples("images", images, least=2)
    _validate.labels("labels", labels, len(images))
    rng = training.generator_on("cpu", seed)
    torch.manual_seed(seed)
    model = FeatureClassifier(tuple(images.shape[1:]), int(labels.max()) + 1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=1e-4, fused=True)

    def update(state: training.State) -> dict[str, Tensor]:
        index = torch.randint(len(images), (batch_size,), generator=rng)
        x = images[index]
        loss = cross_entropy(model(x + 0.2 * torch.randn(x.shape, generator=rng)), labels[index])
        training.optimizer_step(loss, optimizer)
        return {"loss": loss.detach()}

    training.fit(training.State({"net": model}, {"net": optimizer}, rng), update, steps,
                 progress=progress, description="classifier")
    return model.eval().requires_grad_(False)
