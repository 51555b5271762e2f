"""Data rows in the ecosystem's parquet schema."""
