"""What arrives: request traces, generators with cited parameters, arrival processes, load over HTTP."""
