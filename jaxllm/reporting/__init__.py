"""What a run tells its user: progress line, tables, metrics file, plots, samples, report page."""
