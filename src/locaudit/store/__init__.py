"""Run folders, their database, and the cache that all runs of a user share.

A run folder holds:

config.yaml      all settings, with every default spelled out
trials.sqlite    fits, scores, generated answers and their judgements, manifest
edits/           one safetensors file per edit
cache/           what all trials share: probes, the unedited model's log-probabilities, drift documents
verdict.json, trials.csv, report.html
"""
