"""Is the verdict calibrated? Nulls, simulated and real, and models in which localization is a fact."""
