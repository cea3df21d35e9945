"""Model families, one file each, written against the names in `cupyllama.ops`."""
