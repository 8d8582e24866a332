"""Studies that check the library: the paper's experiments, and the calibration of the verdict."""
