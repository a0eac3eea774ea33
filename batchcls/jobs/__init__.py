"""The commands: `python -m batchcls.jobs.NAME`. Thin: config, call, exit code."""
