"""The modules of data_filter.py: measure tiles, apply manual edits of tiles.csv, draw pictures. None needs torch."""
