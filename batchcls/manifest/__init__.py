"""The input table: reading, checking, sampling and labels of a Parquet manifest."""
