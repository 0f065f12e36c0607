"""Layers that are spread over the ranks."""

from __future__ import annotations

from hvdtrain.nn.feature_partitioned_linear import FeaturePartitionedLinear

__all__ = ["FeaturePartitionedLinear"]
