"""Fused conv + ReLU + max-pool and softmax cross-entropy for PyTorch, on CPU and CUDA."""

from fastcls import _load as _load  # registers the ops before anything refers to them
from fastcls import flops as flops  # tells torch.utils.flop_counter
from fastcls import functional
from fastcls.fusing import fuse, fusion_report, unfuse
from fastcls.info import build_info, package_version
from fastcls.modules import FusedConvBlock, FusedCrossEntropyLoss

__all__ = [
    "FusedConvBlock",
    "FusedCrossEntropyLoss",
    "build_info",
    "functional",
    "fuse",
    "fusion_report",
    "unfuse",
]
__version__ = package_version()
