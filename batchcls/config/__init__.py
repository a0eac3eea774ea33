"""The settings of every job: one field, one sentence of help, one check.

`batchcls.cli.arguments` turns each class into a command line and reads it from TOML, so a name is only defined
here.
"""
