"""The public functions."""

from fastcls.ops.conv_block import conv_block, conv_block_path
from fastcls.ops.cross_entropy import cross_entropy, cross_entropy_with_hits

__all__ = ["conv_block", "conv_block_path", "cross_entropy", "cross_entropy_with_hits"]
