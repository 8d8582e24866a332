"""Where is it kept? The run folder, its database, and what all runs of a user share.

config.yaml      the configuration, every default spelled out
trials.sqlite    fits, measurements, answers and their judgements, manifest
edits/           one safetensors file a fit
cache/           what all trials share (activations' statistics, reference log-probabilities, drift text)
verdict.json, report.html, figures/
"""
