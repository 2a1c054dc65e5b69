"""Segment-aware kernels: the selective scan and the causal convolution over a tree of segments, and who computes them."""

from hymba_align.model.kernels.conv import GatherConv
from hymba_align.model.kernels.interface import ConvRow, ScanRow, causal_conv, selective_scan
from hymba_align.model.kernels.scan import ChunkedScan

__all__ = ["ChunkedScan", "ConvRow", "GatherConv", "ScanRow", "causal_conv", "selective_scan"]
