"""Kernels run on this machine, for its calibration."""
