"""`merit diagnose`: why the merged model is as it is. `diagnose` orchestrates, `basin` holds the mathematics."""
