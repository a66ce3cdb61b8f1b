"""What test_focal_gpu.py runs under compute-sanitizer: every kernel, at sizes that leave every kind of rest.

The caching allocator would hide a read past a tensor's end: PYTORCH_NO_CUDA_MEMORY_CACHING=1 turns it off.
"""

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from facefast.ops import Combined, Cos, batch_norm_act, focal_loss, linear_focal_loss, sigmoid_focal_loss

for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for classes in (1, 2, 7, 33, 1001, 9001, 70001):
        x = torch.randn(5, classes, device="cuda", dtype=dtype, requires_grad=True)
        y = torch.arange(5, device="cuda") % classes
        focal_loss(x, y, label_smoothing=0.1).backward()
        focal_loss(x, y, margin=Combined(1.1, 0.1, 0.1), reduction="none").sum().backward()
        sigmoid_focal_loss(x, torch.ones_like(x, dtype=torch.float32)).backward()
    x, weight = (torch.randn(n, 24, device="cuda", dtype=dtype, requires_grad=True) for n in (5, 333))
    y = torch.arange(5, device="cuda")
    linear_focal_loss(x, weight, y, normalize=True, margin=Cos(0.1), chunk=100).backward()
    if dtype != torch.float64:  # which batch normalisation leaves to torch
        for channels, places in ((8, 1), (24, 3), (264, 9)):
            x, added = torch.randn(2, 3, channels, places, places, device="cuda", dtype=dtype).unbind()
            x, added = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, added))
            weight, bias, mean, var = torch.rand(4, channels, device="cuda").unbind()
            for how in ({}, {"relu": True}, {"slope": weight}, {"residual": added}, {"relu": True, "residual": added}):
                batch_norm_act(x, weight, bias, mean, var, **how).sum().backward()
torch.cuda.synchronize()
