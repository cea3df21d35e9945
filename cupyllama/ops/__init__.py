"""The operations of a decoder, twice under the same names: `reference` (NumPy) and `cuda`."""
