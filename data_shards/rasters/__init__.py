"""Rasters: images that are measurements (many bands, more than 8 bits, no-data, coordinates) become 8-bit pictures."""
