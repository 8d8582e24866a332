"""How does it run? Inputs, plan, preparation, trials, judging, resumption, estimate."""
