"""One short file per kind of run: config to model, objective and source, then the loop."""
