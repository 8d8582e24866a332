"""Is it right? The paper's study and the calibration of the verdict: users of the library, like any other."""
