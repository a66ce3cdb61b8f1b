"""facefast's loader and focal loss in a training loop of one's own; the network and everything else are plain torch.

python examples/own_training_loop.py                                  # drawn faces, half a minute
python examples/own_training_loop.py DIR [--epochs N]                 # a folder per person, CelebA, RecordIO, ...
"""

import argparse

import torch
from torchvision.models import resnet18

from facefast.data import make_loader, make_sampler, read_index
from facefast.data.drawn import synthetic
from facefast.ops import focal_loss
from facefast.recipe import AugmentSpec, ImageSpec

parser = argparse.ArgumentParser()
parser.add_argument("root", nargs="?", help="photographs; faces are drawn without it")
parser.add_argument("--epochs", type=int, default=8)
given = parser.parse_args()
root = given.root or synthetic.write("data/few-faces", synthetic.DrawnSpec(identities=(12, 0, 0)), processes=1)
train, test = read_index(root).scanned().sound().split_per_identity(0.2, seed=0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = resnet18(num_classes=train.num_classes).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
image, augment = ImageSpec(size=64), AugmentSpec(crop=0.1, flip=0.5, rotation=5, brightness=0.2, contrast=0.2)
sampler = make_sampler("epoch", labels=train.labels, batch_size=32, seed=0)
with make_loader(train, image, sampler=sampler, augment=augment, device=device) as loader:
    for epoch in range(given.epochs):
        loader.set_epoch(epoch)  # a new order and new augmentation; (seed, epoch, row) alone decide both
        for batch in loader:  # on the device; the label of a padded or unreadable row is one that the loss ignores
            optimizer.zero_grad()
            loss = focal_loss(model(batch.images), batch.labels, gamma=2.0)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
with make_loader(test, image, batch_size=32, device=device) as loader, torch.inference_mode():
    right = sum(int((model.eval()(batch.images).argmax(1) == batch.labels).sum()) for batch in loader)
print(f"top-1 {right / len(test):.1%} on {len(test)} pictures kept from training")
