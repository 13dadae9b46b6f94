"""Sources of examples, and the loader that makes batches of them."""
