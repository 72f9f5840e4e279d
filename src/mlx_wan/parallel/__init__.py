"""Several processes for one video: who takes which tokens, which pass and which weights, and who watches whom."""
