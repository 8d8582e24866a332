"""What does an edit do? Answer trees and forwards, generation, drift, activations, scores of a question."""
