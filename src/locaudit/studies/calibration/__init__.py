"""Calibration of the verdict: error rates under a true null hypothesis, and models with a known localization."""
