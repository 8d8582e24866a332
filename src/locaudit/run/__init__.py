"""Running an audit: reading inputs, planning, preparing, running and judging trials, resuming, estimating time."""
