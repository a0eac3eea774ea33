"""The commands: `batchcls NAME`. Thin: config, call, exit code."""
