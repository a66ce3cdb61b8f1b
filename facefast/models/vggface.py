"""VGGFace (Parkhi et al. 2015, "Deep Face Recognition"): VGG-16 up to fc7.

Names of layers and parameters are those of the published Caffe network and of its port to PyTorch (S. Albanie's
vgg_face_dag.pth), whose keys load one for one; `weights.foreign` gives them to Caffe's, Torch7's and Keras' files.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

# (convolutions, channels) between two poolings.
BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
LAYERS = tuple(f"conv{block}_{k}" for block, (count, _) in enumerate(BLOCKS, start=1) for k in range(1, count + 1))
"""The 13 convolutions, from the picture on."""
DESCRIPTOR = 4096
REDUCTION = 32
STAGES = {("stem" if b == 1 else f"stage{b - 1}"): tuple(n for n in LAYERS if n[4] == str(b)) for b in range(1, 6)}
STAGES |= {"stage5": ("fc6",), "stage6": ("fc7",)}


class VGGFace(nn.Module):
    """Pictures [B, 3, H, W] to descriptors [B, 4096], none below 0: fc7 after its ReLU.

    In training, dropout of one half between fc6 and fc7 as published; the one after fc7 is `model.dropout`'s.

    Args:
        shape: (height, width) of the pictures; fc6 has weights per cell of the last feature map, so a trained network
            takes this shape only.

    Raises:
        ValueError: pictures so small that nothing is left of them.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        cells = (shape[0] // REDUCTION) * (shape[1] // REDUCTION)
        if cells == 0:
            raise ValueError(
                f"vggface cannot take pictures of {shape[0]}x{shape[1]} pixels; image.size must be at least {REDUCTION}"
            )
        channels = 3
        for block, (count, out) in enumerate(BLOCKS, start=1):
            for k in range(1, count + 1):
                self.add_module(f"conv{block}_{k}", nn.Conv2d(channels, out, 3, padding=1))
                channels = out
        self.dropout = nn.Dropout(0.5)
        self.fc6 = nn.Linear(channels * cells, DESCRIPTOR)
        self.fc7 = nn.Linear(DESCRIPTOR, DESCRIPTOR)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to descriptors [B, 4096]."""
        x = images
        for block, (count, _) in enumerate(BLOCKS, start=1):
            for k in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{block}_{k}")(x))
            x = F.max_pool2d(x, 2)
        x = self.dropout(F.relu(self.fc6(x.flatten(1))))
        return F.relu(self.fc7(x))
