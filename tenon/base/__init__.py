"""The ground every other package stands on: errors, clock, randomness, files, records, results."""
