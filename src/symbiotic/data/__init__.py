"""Data: from shards and benchmark files to `Batch`. Import the modules; this package imports nothing by itself."""
