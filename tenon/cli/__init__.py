"""The command line: one thin file per job, found in the table of :mod:`tenon.cli.main`."""
