"""Aligned data to a target: the choice of what is fused, the fusion loss, the Trainer."""
