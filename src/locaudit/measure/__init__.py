"""What does an edit do? Answer log-probabilities and the scores from them, generated answers, drift, activations."""
