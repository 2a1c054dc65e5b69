"""Segment-aware kernels: the selective scan and the causal convolution over a tree of segments."""

from hymba_align.model.kernels.conv import ConvPlan, causal_conv
from hymba_align.model.kernels.scan import ScanPlan, selective_scan

__all__ = ["ConvPlan", "ScanPlan", "causal_conv", "selective_scan"]
