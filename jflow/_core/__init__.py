"""What every package needs: arrays, checks, keys, Linen glue, files. Nothing here is public."""
