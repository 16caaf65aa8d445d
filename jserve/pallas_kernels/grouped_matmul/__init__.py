"""Products of rows that are grouped by expert with the weight of their expert."""
